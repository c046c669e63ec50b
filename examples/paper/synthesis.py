"""Compare decoded samples with real images, by an independent classifier's answers and the distances of its features.

All statistics use the features of a small classifier that is trained on the data set itself. So numbers can be compared
between methods on one data set. They cannot be compared with FIDs of Inception features.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from proto_reg import PrototypeHead

from .trained import ImageData

FEATURES = 64
_kept: dict[str, dict[str, Tensor]] = {}  # results that this process has computed for a data set


class Judge(nn.Module):
    """A small convolutional classifier of images (B, C*H*W). ``features`` are its last hidden layer (B, 64)."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.body = nn.Sequential(
            nn.Unflatten(1, shape),
            nn.Conv2d(channels, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * -(-height // 4) * -(-width // 4), FEATURES),
            nn.ReLU(),
        )
        self.top = nn.Sequential(nn.Dropout(0.3), nn.Linear(FEATURES, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.top(self.body(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self.body(part) for part in images.split(1000)])

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        return self.top(self.features(images)).argmax(1)


def once(name: str, data: ImageData, compute: Callable[[], dict[str, Tensor]], cache: Path | None) -> dict[str, Tensor]:
    """Tensors that depend only on the data set. A process computes them once. A ``cache`` shares them with others."""
    sample = data.train_images[::101].cpu().numpy().tobytes() + data.test_images[::101].cpu().numpy().tobytes()
    key = f"{data.name}-{name}-{blake2b(data.train_labels.cpu().numpy().tobytes() + sample, digest_size=8).hexdigest()}"
    file = cache / f"{key}.pt" if cache else None
    if key not in _kept:
        if file is not None and file.exists():
            _kept[key] = torch.load(file, weights_only=True, map_location=data.train_images.device)
        else:
            _kept[key] = compute()
    if file is not None and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        torch.save(_kept[key], part)
        part.replace(file)  # another process may be reading it
    return _kept[key]


def judge_of(data: ImageData, cache: Path | None = None) -> Judge:
    """The classifier of a data set. It is trained only on training images and does not change the random state."""
    # The labels of both splits give the number of classes. The test images are not used.
    classes = int(torch.cat([data.train_labels, data.test_labels]).max()) + 1
    device = data.train_images.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        judge = Judge(data.shape, classes).to(device)
        judge.load_state_dict(once("judge", data, lambda: _train(judge, data), cache))
    return judge.eval()


@torch.enable_grad()
def _train(judge: Judge, data: ImageData, batch_size: int = 128) -> dict[str, Tensor]:
    epochs = max(5, -(-1200 * batch_size // len(data.train_images)))  # 1200 steps at least
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    judge.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data.train_images)).to(data.train_images.device).split(batch_size):
            loss = F.cross_entropy(judge(data.train_images[index]), data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return judge.state_dict()


@torch.no_grad()
def control(
    decode: Callable[[Tensor], Tensor],
    head: PrototypeHead,
    majority: Tensor,
    judge: Callable[[Tensor], Tensor],
    *,
    std: Tensor | float = 1.0,
    per_prototype: int = 100,
) -> float:
    """The share of decoded samples around v_k that the judge puts into the majority class of cluster k. All K count.

    Args:
        majority: (K,) the most common class of cluster k's training latents. For an empty cluster it is -1 and wrong.
        judge: images (B, C*H*W) -> classes (B,).
        std: the standard deviation of the noise, a number or (K, D).
    """
    images = decode(around(head, per_prototype, std))
    right = judge(images) == majority.repeat_interleave(per_prototype)
    return right.float().mean().item()


@torch.no_grad()
def around(head: PrototypeHead, per_prototype: int, std: Tensor | float = 1.0) -> Tensor:
    """Latents (K * per_prototype, D) of N(v_k, std^2), prototype by prototype. Every call has the same noise."""
    v = head.prototypes
    noise = torch.randn(len(v), per_prototype, v.shape[1], generator=torch.Generator().manual_seed(0)).to(v)
    spread = std[:, None] if isinstance(std, Tensor) else std
    return (v[:, None] + spread * noise).flatten(0, 1)


def frechet_distance(real: Tensor, other: Tensor) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^1/2) of features (N, F) and (M, F), as in Heusel et al. (2017)."""

    class Given(nn.Identity):
        num_features = real.shape[1]

    distance = FrechetInceptionDistance(feature=Given()).to(real.device)
    distance.update(real.double(), real=True)
    distance.update(other.double(), real=False)
    return distance.compute().item()


def precision_recall(real: Tensor, other: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """The share of ``other`` (M, F) on the manifold of ``real`` (N, F), and the reverse (Kynkaanniemi et al., 2019).

    The manifold is the union of balls around all points. A ball reaches to the third neighbour of its point.
    """

    def share(points: Tensor, of: Tensor) -> float:
        radii = torch.cat([torch.cdist(part, of).kthvalue(neighbours + 1).values for part in of.split(1000)])
        inside = [(torch.cdist(part, of) <= radii).any(1) for part in points.split(1000)]
        return torch.cat(inside).float().mean().item()

    return share(other, real), share(real, other)


def diversity(samples: Tensor, real: Tensor, clusters: Tensor) -> float:
    """The mean distance between a prototype's samples, divided by that between real images of its cluster.

    At 1, the samples are as varied as the real images.

    Args:
        samples: features (K, P, F) of samples around each prototype.
        real: features (N, F) of real images. ``clusters`` (N,) is the prototype of each one. A cluster with fewer than
            two images, or only with copies of one image, cannot be compared and is left out. If all are left out, the
            result is NaN.
    """
    ratios = []
    for k, features in enumerate(samples):
        members = real[clusters == k][: len(features)]
        apart = torch.pdist(members).mean().item() if len(members) > 1 else 0.0
        if apart > 0:
            ratios.append(torch.pdist(features).mean().item() / apart)
    return sum(ratios) / len(ratios) if ratios else float("nan")
