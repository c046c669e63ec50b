"""Measurements for five choices: how prototypes learn, a VAE's KL term and noise, a queue, scale, and shares.

python examples/ablations.py prototypes --data-dir DIR        # V by gradient, faster, from data, or following latents
python examples/ablations.py kl --data-dir DIR                # the layer on mu or on the sample, with or without KL
python examples/ablations.py queue --data-dir DIR             # batches of 16 latents, with or without past ones
python examples/ablations.py scale --data-dir DIR             # a linear output and a squared error: close latents
python examples/ablations.py shares --data-dir DIR --long-tail  # equal or adaptive shares of unequal classes

Each run prints a line. Then each variant prints its mean over the seeds. The default data are scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from evaluation import COLUMNS, evaluate, print_table, train_judge
from image_data import Images, load_for
from quickstart import VAE
from sklearn.cluster import KMeans
from torch import Tensor, nn
from tqdm import tqdm

import proto_reg
from proto_reg import Schedule

NMI = {"nmi": ("NMI", ".3f")}  # between nearest prototypes and classes


class ScaledHead(proto_reg.PrototypeHead):
    """The prototypes are ten times their parameter. So Adam's steps on them are ten times as large."""

    FACTOR = 10.0

    def __init__(self, latent_dim: int, num_prototypes: int) -> None:
        super().__init__(latent_dim, num_prototypes)
        self.raw = nn.Parameter(self._parameters.pop("prototypes").detach() / self.FACTOR)

    @property
    def prototypes(self) -> Tensor:
        return self.raw * self.FACTOR


class Variant(VAE):
    """The quickstart's VAE with the layer, and with or without the KL term.

    The layer is on mu, before the noise (if there is ``noise``), or on the ``sampled`` z.
    """

    def __init__(
        self, pixels: int, args: argparse.Namespace, *, on: str | None, noise: bool, kl: bool, **layer
    ) -> None:
        super().__init__(pixels, args.latent_dim, args.hidden)
        self.on, self.noise, self.kl = on, noise, kl
        # The library's default warm-up would hide some of the differences between the variants.
        options = {"prototype_weight": args.prototype_weight, "schedule": Schedule(mmd_steps=0)} | layer
        build = proto_reg.PrototypicalRegularizer
        self.regularizer = build(args.latent_dim, args.prototypes, **options) if on else None
        self.last: tuple[Tensor, Tensor] | None = None  # latents and their assignments

    def loss(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu
        if self.on == "mu":
            z, info = self.regularizer(mu)
            self.last = mu.detach(), info.assignments
        if self.noise:
            z = z + (0.5 * logvar).exp() * torch.randn_like(mu)
        if self.on == "sampled":
            z, _ = self.regularizer(z)
        loss = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return loss - 0.5 * (1 + logvar - mu.square() - logvar.exp()).sum() if self.kl else loss


class LinearOutput(Variant):
    """A plain autoencoder with a mean squared error."""

    def __init__(self, pixels: int, args: argparse.Namespace, *, on: str | None = "mu", **layer) -> None:
        super().__init__(pixels, args, on=on, noise=False, kl=False, **layer)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def loss(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        if self.regularizer:
            z, _ = self.regularizer(z)
        return F.mse_loss(self.decode(z), x, reduction="sum")


def prototype_variants(pixels: int, args: argparse.Namespace) -> dict[str, Callable[[], Variant]]:
    """Ways for V to learn. All are on mu, without noise and KL. With ``follow_rate=0`` only the gradient moves V."""
    form = {"on": "mu", "noise": False, "kl": False}

    def build(scaled: bool = False, **layer) -> Callable[[], Variant]:
        def make() -> Variant:
            return Variant(
                pixels, args, **form, **layer, head=ScaledHead(args.latent_dim, args.prototypes) if scaled else None
            )

        return make

    return {
        "autoencoder": lambda: Variant(pixels, args, on=None, noise=False, kl=False),
        "gradient": build(follow_rate=0.0),
        "own group, 10 x rate": build(follow_rate=0.0),
        "scaled by 10": build(follow_rate=0.0, scaled=True),
        "k-means after warm-up": build(follow_rate=0.0, schedule=Schedule(warmup_steps=args.warmup, mmd_steps=0)),
        "towards the mean, .02": build(follow_rate=0.0),
        "towards typical latents, .02": build(follow_rate=0.02),
        "towards typical latents, .05": build(follow_rate=0.05),
    }


def kl_variants(pixels: int, args: argparse.Namespace) -> dict[str, Callable[[], Variant]]:
    """Choices for the KL term and the sampling noise."""
    forms = {
        "autoencoder": (None, False, False),
        "VAE": (None, True, True),
        "on mu, no noise, no KL": ("mu", False, False),
        "on mu, noise, no KL": ("mu", True, False),
        "on sampled z, no KL": ("sampled", True, False),
        "on mu, noise, KL": ("mu", True, True),
        "on sampled z, KL": ("sampled", True, True),
    }
    return {
        name: lambda on=on, noise=noise, kl=kl: Variant(pixels, args, on=on, noise=noise, kl=kl)
        for name, (on, noise, kl) in forms.items()
    }


def queue_variants(pixels: int, args: argparse.Namespace) -> dict[str, Callable[[], Variant]]:
    """Small batches with and without past latents. All variants are on mu, without noise and KL."""

    def build(size: int = 0) -> Callable[[], Variant]:
        def variant() -> Variant:
            queue = proto_reg.LatentQueue(size, args.latent_dim) if size else None
            return Variant(pixels, args, on="mu", noise=False, kl=False, queue=queue)

        return variant

    return {
        "autoencoder": lambda: Variant(pixels, args, on=None, noise=False, kl=False),
        "no queue": build(),
        "queue 256": build(256),
        "queue 1024": build(1024),
    }


def scale_variants(pixels: int, args: argparse.Namespace) -> dict[str, Callable[[], LinearOutput]]:
    """Cures for a reconstruction that leaves latents much closer to each other than N(v, I)."""
    return {
        "autoencoder": lambda: LinearOutput(pixels, args, on=None),
        "std = None": lambda: LinearOutput(pixels, args),  # follows the scale of the latents
        **{f"std = {std:g}": lambda std=std: LinearOutput(pixels, args, std=std) for std in (1, 0.5, 0.25, 0.125)},
        "mmd_weight = 1": lambda: LinearOutput(pixels, args, mmd_weight=1.0),
    }


def share_variants(pixels: int, args: argparse.Namespace) -> dict[str, Callable[[], Variant]]:
    """Prototypes with equal shares of a batch, and with shares that training finds."""

    def build(smoothing: float | None) -> Callable[[], Variant]:
        def make() -> Variant:
            chosen = {"marginals": "adaptive", "num_prototypes": args.prototypes, "smoothing": smoothing}
            assigner = proto_reg.SinkhornAssigner(**(chosen if smoothing else {}))
            return Variant(pixels, args, on="mu", noise=False, kl=False, assigner=assigner)

        return make

    return {
        "autoencoder": lambda: Variant(pixels, args, on=None, noise=False, kl=False),
        "equal": build(None),
        "adaptive, smoothing .1": build(0.1),
        "adaptive, smoothing .3": build(0.3),
    }


STUDIES = {
    "prototypes": prototype_variants,
    "kl": kl_variants,
    "queue": queue_variants,
    "scale": scale_variants,
    "shares": share_variants,
}


def long_tail(data: Images) -> Images:
    """Random subsets of training and test images. Each class has half as many images as the one before."""
    generator = torch.Generator().manual_seed(0)

    def kept(labels: Tensor) -> Tensor:
        most = int(torch.bincount(labels).min())
        of_class = [(labels == c).nonzero()[:, 0] for c in range(int(labels.max()) + 1)]
        drawn = [index[torch.randperm(len(index), generator=generator)] for index in of_class]
        return torch.cat([index[: max(1, most >> c)] for c, index in enumerate(drawn)])

    train, test = kept(data.train_labels), kept(data.test_labels)
    return Images(
        f"{data.name}, long tail",
        data.train[train],
        data.train_labels[train],
        data.test[test],
        data.test_labels[test],
        data.shape,
    )


@torch.no_grad()
def follow_the_mean(prototypes: Tensor, latents: Tensor, assignments: Tensor, rate: float) -> None:
    """Move the prototypes as the layer does, but give the same weight to every latent of a cluster."""
    members = F.one_hot(assignments, len(prototypes)).to(latents)
    counts = members.sum(0)[:, None]
    means = members.T @ latents / counts.clamp_min(1)
    prototypes.lerp_(torch.where(counts > 0, means, prototypes), rate)


def train(name: str, model: Variant, data: Images, args: argparse.Namespace) -> None:
    """An ordinary training loop. Some variants need more than the layer. They get it here."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if name.startswith("own group"):
        own = {id(p) for p in model.regularizer.parameters()}
        rest = [p for p in model.parameters() if id(p) not in own]
        groups = [{"params": rest}, {"params": list(model.regularizer.parameters()), "lr": 1e-2}]
        optimizer = torch.optim.Adam(groups, lr=1e-3)
    step = 0
    for _ in tqdm(range(args.epochs), desc=name, leave=False, disable=None):
        for index in torch.randperm(len(data.train)).split(args.batch_size):
            if name.startswith("k-means") and step == args.warmup:
                with torch.no_grad():
                    z = model.encode(data.train[:4096])
                    centres = KMeans(args.prototypes, n_init=1, random_state=0).fit(z.numpy()).cluster_centers_
                    model.regularizer.head.prototypes.copy_(torch.from_numpy(centres))
            loss = model.loss(data.train[index]) / len(index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if name.startswith("towards the mean"):
                follow_the_mean(model.regularizer.head.prototypes, *model.last, 0.02)
            step += 1
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=STUDIES)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="default: 100 for the digits, 8 for larger data")
    parser.add_argument("--prototypes", type=int, default=30)
    parser.add_argument("--prototype-weight", type=float, default=0.03)
    parser.add_argument("--batch-size", type=int, help="default: 64 for the digits, 256 for larger data; queue: 16")
    parser.add_argument("--long-tail", action="store_true", help="each class has half the images of the one before")
    parser.add_argument("--only", nargs="*", help="names of the variants to run")
    args = parser.parse_args()
    data = load_for(parser, args.data_dir)
    small = len(data.train) < 10_000
    args.epochs = args.epochs or (100 if small else 8)
    args.latent_dim, args.hidden = (32, 256) if small else (256, 512)
    args.batch_size = args.batch_size or (16 if args.what == "queue" else 64 if small else 256)
    args.warmup = (args.epochs // 8) * -(-len(data.train) // args.batch_size)
    torch.manual_seed(0)  # for the judge's weights
    judge = train_judge(data, 60 if small else 5, torch.Generator().manual_seed(0))

    if args.long_tail:  # after the judge has seen all images
        data = long_tail(data)
    variants = STUDIES[args.what](data.train.shape[1], args)
    means: list[dict[str, float | str]] = []
    for name in args.only or variants:
        rows: list[dict[str, float | str]] = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            start = time.perf_counter()
            model = variants[name]()
            train(name, model, data, args)
            seconds = time.perf_counter() - start
            head = model.regularizer.head if model.regularizer else None
            measured = evaluate(model.encode, model.decode, data, judge, head, args.prototypes)
            rows.append({"model": f"{name}, seed {seed}", **measured, "seconds": seconds})
        print_table(rows, COLUMNS | NMI)
        means.append(
            {"model": name} | {key: sum(r[key] for r in rows) / len(rows) for key in rows[0] if key != "model"}
        )
    print(f"\n{data.name}, K = {args.prototypes}, {args.epochs} epochs, mean of {args.seeds} seeds")
    print_table(means, COLUMNS | NMI)


if __name__ == "__main__":
    main()
