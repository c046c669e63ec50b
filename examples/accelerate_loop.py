"""Prototypes in an accelerate loop (needs proto_reg[accelerate,examples]).

python examples/accelerate_loop.py                # digits, one process; or: accelerate launch examples/...
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from image_data import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import proto_reg
from proto_reg.integrations.accelerate import log_metrics


class Autoencoder(nn.Module):
    def __init__(self, pixels: int = 64, latent_dim: int = 32, hidden: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=80)
parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
args = parser.parse_args()
set_seed(0)
accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision, gradient_accumulation_steps=2)
data, model = load_digits(), Autoencoder()
proto_reg.attach(model, "encoder", latent_dim=32, num_prototypes=30)  # + added
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
loader = DataLoader(TensorDataset(data.train), batch_size=48, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(args.epochs):
    for (x,) in loader:
        with accelerator.accumulate(model):
            loss = F.binary_cross_entropy_with_logits(model(x), x)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    values = log_metrics(accelerator, model, epoch)  # + added

model = accelerator.unwrap_model(model).eval()
with torch.no_grad():
    z = model.encoder(data.test)
    metrics = proto_reg.functional.latent_metrics(z, model.prototypes.head, data.test_labels)
    mse = F.mse_loss(model.decoder(z).sigmoid(), data.test)
accelerator.print(f"test MSE {mse:.4f}, purity {metrics['purity']:.2f}, r^2/D {metrics['r2_per_dim']:.2f}")
accelerator.print({name: round(value, 2) for name, value in values.items()})
