"""Prototypes in a LightningModule that does not know about them (needs proto_reg[lightning,examples]).

python examples/lightning_callback.py             # digits, half a minute; draws prototypes-*.png into prototypes/
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from image_data import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import proto_reg
from proto_reg.integrations.lightning import PrototypeCallback


class Autoencoder(L.LightningModule):
    def __init__(self, pixels: int = 64, latent_dim: int = 32, hidden: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z).sigmoid()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        (x,) = batch
        loss = F.binary_cross_entropy_with_logits(self.decoder(self.encoder(x)), x)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=40)
args = parser.parse_args()
L.seed_everything(0)
data, model = load_digits(), Autoencoder()
prototypes = PrototypeCallback(
    "encoder",
    latent_dim=32,
    num_prototypes=30,
    decode="decode",
    image_shape=data.shape,
    every_n_epochs=args.epochs,
    folder="prototypes",  # without it, a TensorBoard or W&B logger gets the pictures
)
trainer = L.Trainer(max_epochs=args.epochs, accelerator="cpu", callbacks=[prototypes], gradient_clip_val=1.0)
trainer.fit(model, DataLoader(TensorDataset(data.train), batch_size=48, shuffle=True))

model.eval()
with torch.no_grad():
    z = model.encoder(data.test)
    metrics = proto_reg.functional.latent_metrics(z, model.prototypes.head, data.test_labels)
    mse = F.mse_loss(model.decode(z), data.test)
print(f"test MSE {mse:.4f}, purity {metrics['purity']:.2f}, r^2/D {metrics['r2_per_dim']:.2f}")
print({name: round(value.item(), 2) for name, value in trainer.callback_metrics.items()})
