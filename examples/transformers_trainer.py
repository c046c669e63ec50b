"""Prototypes under an unmodified transformers.Trainer (needs proto_reg[transformers,examples]).

python examples/transformers_trainer.py           # digits, half a minute; checkpoints go to --out
"""

import argparse

import torch
import torch.nn.functional as F
from image_data import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments

import proto_reg
from proto_reg.integrations.transformers import PrototypeTrainerCallback


class Autoencoder(nn.Module):
    def __init__(self, pixels: int = 64, latent_dim: int = 32, hidden: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.decoder(self.encoder(pixel_values))
        return {"loss": F.binary_cross_entropy_with_logits(logits, pixel_values), "logits": logits}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--out", default="trainer_output")
args = parser.parse_args()
torch.manual_seed(0)
data, model = load_digits(), Autoencoder()
arguments = TrainingArguments(
    args.out,
    num_train_epochs=args.epochs,
    learning_rate=2e-3,
    per_device_train_batch_size=48,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    logging_strategy="epoch",
)
trainer = Trainer(model, arguments, train_dataset=[{"pixel_values": x} for x in data.train])
trainer.add_callback(PrototypeTrainerCallback(trainer, "encoder", latent_dim=32, num_prototypes=30))  # + added
trainer.train()

model.eval()
with torch.no_grad():
    z = model.encoder(data.test)
    metrics = proto_reg.functional.latent_metrics(z, model.prototypes.head, data.test_labels)
    mse = F.mse_loss(model.decoder(z).sigmoid(), data.test)
print(f"test MSE {mse:.4f}, purity {metrics['purity']:.2f}, r^2/D {metrics['r2_per_dim']:.2f}")
