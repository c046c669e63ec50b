"""The measurements behind two defaults: how prototypes should learn, and what becomes of a VAE's KL term and noise.

    python examples/ablations.py prototypes --data-dir MNIST --seeds 2
    python examples/ablations.py kl --data-dir MNIST --seeds 2

Each prints one line a run, then the mean of each variant.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from evaluation import evaluate, train_judge
from image_data import Images, load
from sklearn.cluster import KMeans
from torch import Tensor, nn
from tqdm import tqdm

import proto_reg

COLUMNS = ("mse", "purity", "kmeans_purity", "prototypes_right", "control", "r2_per_dim", "seconds")
PROTOTYPES = (
    "gradient",
    "param group x10",
    "scale x10",
    "scale x3",
    "k-means++ init",
    "k-means init",
    "k-means init, scale x10",
    "running mean",
)
KL = ("autoencoder", "vae", "mu", "mu, noise", "sampled", "mu, kl", "sampled, kl")


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ScaledHead(proto_reg.PrototypeHead):
    """Prototypes that are ``factor`` times the parameter: Adam's steps on them are as many times larger."""

    def __init__(self, latent_dim: int, num_prototypes: int, factor: float) -> None:
        super().__init__(latent_dim, num_prototypes)
        self.factor = factor
        self.register_parameter("raw", nn.Parameter(self._parameters.pop("prototypes").detach() / factor))

    @property
    def prototypes(self) -> Tensor:
        return self.raw * self.factor

    @prototypes.setter
    def prototypes(self, value: Tensor) -> None:
        with torch.no_grad():
            self.raw.copy_(value / self.factor)


def train_prototypes(variant: str, data: Images, args: argparse.Namespace) -> dict[str, float]:
    """A plain autoencoder with the layer, prototypes learning as ``variant`` says."""
    pixels = data.train.shape[1]
    encoder, decoder = mlp(pixels, args.hidden, args.latent_dim), mlp(args.latent_dim, args.hidden, pixels)
    factor = float(variant.rsplit("x", 1)[1]) if "scale x" in variant else 1.0
    head = (
        ScaledHead(args.latent_dim, args.prototypes, factor)
        if factor != 1
        else proto_reg.PrototypeHead(args.latent_dim, args.prototypes)
    )
    steps_per_epoch = -(-len(data.train) // args.batch)
    warmup = steps_per_epoch if "init" in variant else 0
    layer = proto_reg.PrototypicalRegularizer(
        args.latent_dim,
        args.prototypes,
        head=head,
        warmup_steps=warmup,
        prototype_weight=args.weight,
        mmd_weight=args.weight,
    )
    groups = [{"params": [*encoder.parameters(), *decoder.parameters()]}, {"params": list(layer.parameters())}]
    if variant == "param group x10":
        groups[1]["lr"] = 1e-2
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    step = 0
    for _ in tqdm(range(args.epochs), desc=variant, leave=False):
        for index in torch.randperm(len(data.train)).split(args.batch):
            if "init" in variant and step == warmup:
                z = encoder(data.train[:4096]).detach()
                if "++" in variant:
                    head.init_from(z)
                else:
                    found = torch.from_numpy(KMeans(args.prototypes, n_init=1).fit(z.numpy()).cluster_centers_)
                    head.prototypes = (
                        found
                        if factor != 1
                        else nn.Parameter(head.prototypes.data.copy_(found))
                        if False
                        else _fill(head, found)
                    )
            x = data.train[index]
            z, info = layer(encoder(x))
            loss = F.binary_cross_entropy_with_logits(decoder(z), x)
            optimizer.zero_grad()
            loss.backward()
            if variant == "running mean":
                layer.head.prototypes.grad = None
            optimizer.step()
            if variant == "running mean":
                _move_to_means(head, z.detach(), info.assignments)
            step += 1
    judge = train_judge(data, 5 if len(data.train) > 10_000 else 60, torch.Generator().manual_seed(0))
    decode = lambda z: decoder(z).sigmoid()  # noqa: E731
    return evaluate(encoder, decode, data, judge, head, args.prototypes)


def _fill(head, value):
    head.prototypes.data.copy_(value)
    return head.prototypes


@torch.no_grad()
def _move_to_means(head: proto_reg.PrototypeHead, z: Tensor, assignments: Tensor, momentum: float = 0.95) -> None:
    counts = torch.bincount(assignments, minlength=head.num_prototypes)[:, None]
    sums = torch.zeros_like(head.prototypes).index_add_(0, assignments, z)
    mean = torch.where(counts > 0, sums / counts.clamp_min(1), head.prototypes)
    head.prototypes.lerp_(mean, 1 - momentum)


def train_kl(variant: str, data: Images, args: argparse.Namespace) -> dict[str, float]:
    """A VAE (mu and logvar heads) in one of the forms of KL."""
    pixels, d = data.train.shape[1], args.latent_dim
    encoder, decoder = mlp(pixels, args.hidden, 2 * d), mlp(d, args.hidden, pixels)
    layer = None
    if variant not in ("autoencoder", "vae"):
        layer = proto_reg.PrototypicalRegularizer(
            d, args.prototypes, head=None if args.scale == 1 else ScaledHead(d, args.prototypes, args.scale)
        )
    parameters = [*encoder.parameters(), *decoder.parameters(), *(layer.parameters() if layer else ())]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    noisy = variant in ("vae", "mu, noise", "sampled", "mu, kl", "sampled, kl")
    sigma = torch.zeros(())
    for _ in tqdm(range(args.epochs), desc=variant, leave=False):
        for index in torch.randperm(len(data.train)).split(args.batch):
            x = data.train[index]
            mu, logvar = encoder(x).chunk(2, dim=1)
            if layer and variant.startswith("mu"):
                mu, _ = layer(mu)
            sigma = (0.5 * logvar).exp()
            z = mu + sigma * torch.randn_like(mu) if noisy else mu
            if layer and variant.startswith("sampled"):
                z, _ = layer(z)
            loss = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
            if variant == "vae" or variant.endswith("kl"):
                loss = loss - 0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
            optimizer.zero_grad()
            (loss / len(x)).backward()
            optimizer.step()
    judge = train_judge(data, 5 if len(data.train) > 10_000 else 60, torch.Generator().manual_seed(0))
    encode = lambda x: encoder(x)[:, :d]  # noqa: E731
    decode = lambda z: decoder(z).sigmoid()  # noqa: E731
    row = evaluate(encode, decode, data, judge, layer.head if layer else None, args.prototypes)
    if noisy:
        row["sigma"] = sigma.mean().item()
    if layer is None:
        prior = decoder(torch.randn(1000, d)).sigmoid()
        row["prior_confidence"] = judge(prior).softmax(1).amax(1).mean().item()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prototypes", "kl"))
    parser.add_argument("--variants", nargs="*")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--prototypes", type=int, default=30)
    parser.add_argument("--latent-dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--weight", type=float, default=0.1)
    parser.add_argument("--scale", type=float, default=1)
    args = parser.parse_args()
    data = load(args.data_dir)
    train, variants = (train_prototypes, PROTOTYPES) if args.what == "prototypes" else (train_kl, KL)
    for variant in args.variants or variants:
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            start = time.perf_counter()
            row = train(variant, data, args)
            row["seconds"] = time.perf_counter() - start
            print(
                f"{variant:24s} seed {seed} "
                + " ".join(
                    f"{k} {row[k]:.4f}"
                    for k in (*COLUMNS, "sigma", "dead", "duplicates", "separation", "perplexity", "prior_confidence")
                    if k in row
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
