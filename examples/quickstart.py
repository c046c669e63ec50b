"""An ordinary VAE, and the same VAE with prototypes. Two lines are added and one is removed.

python examples/quickstart.py                     # scikit-learn's digits, a minute on a CPU core
python examples/quickstart.py --data-dir DIR      # MNIST, Fashion-MNIST or CIFAR-10, in torchvision's folders

It prints a table. It writes quickstart.png, with a decoded prototype and samples around it in each row. It also writes
quickstart.pt. examples/sample.py makes new images from this file.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from evaluation import evaluate, print_table, train_judge
from image_data import Images, load_for
from torch import Tensor, nn
from tqdm import tqdm

import proto_reg
from proto_reg import plots


class VAE(nn.Module):
    """A user's model: Gaussian posterior, reparameterisation and Bernoulli decoder."""

    def __init__(self, pixels: int, latent_dim: int, hidden: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.mu, self.logvar = nn.Linear(hidden, latent_dim), nn.Linear(hidden, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, pixels)
        )

    def encode(self, x: Tensor) -> Tensor:
        return self.mu(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).sigmoid()

    def loss(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
        return F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") + kl


class PrototypicalVAE(VAE):
    """The same model with prototypes instead of the KL term and the sampling noise."""

    def __init__(self, pixels: int, latent_dim: int, num_prototypes: int, hidden: int = 256) -> None:
        super().__init__(pixels, latent_dim, hidden)
        self.regularizer = proto_reg.PrototypicalRegularizer(latent_dim, num_prototypes)  # added

    def loss(self, x: Tensor) -> Tensor:
        z, _ = self.regularizer(self.encode(x))  # added: the layer shapes the latents as gradients pass through it
        return F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")


class Autoencoder(VAE):
    """The same model without prototypes, KL term and noise, for comparison."""

    def loss(self, x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.decoder(self.encode(x)), x, reduction="sum")


def train(model: VAE, data: Images, epochs: int, batch_size: int, seed: int) -> float:
    """An ordinary training loop. It is the same for all three models, and it returns its seconds."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    start = time.perf_counter()
    model.train()
    for _ in (progress := tqdm(range(epochs), desc=f"{type(model).__name__:>16}", disable=None)):
        for index in torch.randperm(len(data.train), generator=generator).split(batch_size):
            loss = model.loss(data.train[index]) / len(index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}")
    model.eval()
    return time.perf_counter() - start


def run(data: Images, args: argparse.Namespace) -> tuple[PrototypicalVAE, list[dict[str, float | str]]]:
    """Train the three models from the same seed and evaluate all of them."""
    pixels = data.train.shape[1]
    torch.manual_seed(args.seed)
    judge = train_judge(data, args.judge_epochs, torch.Generator().manual_seed(args.seed))
    rows: list[dict[str, float | str]] = []
    builders = {
        "VAE (KL)": lambda: VAE(pixels, args.latent_dim, args.hidden),
        "autoencoder": lambda: Autoencoder(pixels, args.latent_dim, args.hidden),
        "with prototypes": lambda: PrototypicalVAE(pixels, args.latent_dim, args.prototypes, args.hidden),
    }
    for name, build in builders.items():
        torch.manual_seed(args.seed)
        model = build()
        seconds = train(model, data, args.epochs, args.batch_size, args.seed)
        head = model.regularizer.head if isinstance(model, PrototypicalVAE) else None
        measured = evaluate(model.encode, model.decode, data, judge, head, args.prototypes)
        rows.append({"model": name, **measured, "seconds": seconds})
    return model, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of IDX files or cifar-10-batches-py; default: digits")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for quickstart.png and quickstart.pt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="default: 100 for the digits, 10 for larger data")
    parser.add_argument("--prototypes", type=int, default=30)
    parser.add_argument("--latent-dim", type=int, help="default: 32 for the digits, 256 for larger data")
    parser.add_argument("--hidden", type=int, help="default: 256 for the digits, 512 for larger data")
    args = parser.parse_args()
    data = load_for(parser, args.data_dir)
    small = len(data.train) < 10_000
    args.epochs = args.epochs or (100 if small else 10)
    args.latent_dim = args.latent_dim or (32 if small else 256)
    args.hidden = args.hidden or (256 if small else 512)
    args.batch_size, args.judge_epochs = (48, 60) if small else (256, 5)

    if small:
        torch.set_num_threads(1)  # a second thread does not speed up such small batches

    print(f"{data.name}: {len(data.train)} training images, {len(data.test)} test images, K = {args.prototypes}")
    model, rows = run(data, args)
    print_table(rows)

    args.out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(args.seed)
    figure = plots.prototypes(
        model.decode, model.regularizer.head, image_shape=data.shape, num_samples=7, blocks=3, generator=generator
    )
    figure.savefig(args.out / "quickstart.png", dpi=100)
    config = {
        "pixels": data.train.shape[1],
        "latent_dim": args.latent_dim,
        "num_prototypes": args.prototypes,
        "hidden": args.hidden,
    }
    torch.save({"config": config, "shape": data.shape, "model": model.state_dict()}, args.out / "quickstart.pt")
    print(f"wrote {args.out / 'quickstart.png'} and {args.out / 'quickstart.pt'}")


if __name__ == "__main__":
    main()
