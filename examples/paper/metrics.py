"""The metrics of a trained run. One call gives a row of the table and the arrays for the figures.

A row leaves out a metric that makes no sense for its method. NaN means that it was measured and is not a number.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from proto_reg import PrototypeHead, functional

from .synthesis import around, control, diversity, frechet_distance, judge_of, once, precision_recall
from .trained import ImageData, TrainedRun

SUBSET = 10_000  # training images for clusters, majority classes and PCA
IMAGES = 5_000  # images on each side in FID, precision and recall
PER_PROTOTYPE = 100
DRAWN = 8  # samples drawn around each prototype
TSNE_POINTS = 1_000


@torch.no_grad()
def evaluate(
    run: TrainedRun, *, num_prototypes: int = 30, cache: Path | None = None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The metrics and arrays of one trained run.

    Args:
        num_prototypes: K for methods without prototypes. k-means clusters their latents, and control is measured
            around its centres.
        cache: the folder for results that depend only on the data set: the classifier and the PCA floor.
    """
    data = run.data
    subset = _subset(len(data.train_images), SUBSET).to(data.train_images.device)
    train_z, test_z = run.encode(data.train_images[subset]), run.encode(data.test_images)
    clusters = KMeans(run.head.num_prototypes if run.head else num_prototypes, n_init=1, random_state=0)
    clusters.fit(train_z.float().cpu().numpy())
    head = run.head or centres_head(torch.from_numpy(clusters.cluster_centers_).to(train_z))

    metrics = reconstruction(run, test_z, cache)
    metrics |= regularity(run, test_z, head)
    found = clusters.predict(test_z.float().cpu().numpy())
    metrics["kmeans_purity"] = purity(torch.from_numpy(found).long(), data.test_labels.cpu())
    metrics |= synthesis(run, head, train_z, subset, test_z, cache)
    return metrics, arrays(run, head, train_z, data.train_labels[subset], test_z)


def centres_head(centres: Tensor) -> PrototypeHead:
    """Prototypes at ``centres`` (K, D). A latent belongs to the nearest one."""
    head = PrototypeHead(centres.shape[1], len(centres), similarity="euclidean").to(centres)
    head.place(slice(None), centres)
    return head


class OnePrior(nn.Module):
    """N(0, I) in the form for latent_metrics: K prototypes are at the origin, and each takes every K-th latent.

    The groups are as large as clusters at this K. The standardised MMD grows with the number of latents, so this makes
    it comparable with that of K clusters.
    """

    def __init__(self, latent_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(num_prototypes, latent_dim))

    def forward(self, z: Tensor) -> Tensor:
        count = len(cast(Tensor, self.prototypes))
        return F.one_hot(torch.arange(len(z), device=z.device) % count, count).to(z)


def reconstruction(run: TrainedRun, test_z: Tensor, cache: Path | None = None) -> dict[str, float]:
    """Errors per pixel on test images, the excess over the images' own entropy, and the error of PCA at the same D."""
    x = run.data.test_images
    # An image of grey pixels has an entropy that no reconstruction removes.
    floor = F.binary_cross_entropy(x, x).item()
    return {
        "test_mse": F.mse_loss(run.decode(test_z), x).item(),
        "test_bce": run.bce,
        "bce_excess": run.bce - floor,
        "pca_mse": pca_floor(run.data, test_z.shape[1], cache),
    }


def pca_floor(data: ImageData, dimensions: int, cache: Path | None = None) -> float:
    """The test MSE of a PCA that is fitted to training images."""
    dimensions = min(dimensions, data.train_images.shape[1], len(data.train_images))

    def compute() -> dict[str, Tensor]:
        subset = _subset(len(data.train_images), 2 * SUBSET)
        pca = PCA(dimensions, random_state=0).fit(data.train_images[subset.to(data.train_images.device)].cpu().numpy())
        x = data.test_images.cpu().numpy()
        return {"mse": torch.tensor(((pca.inverse_transform(pca.transform(x)) - x) ** 2).mean())}

    return once(f"pca{dimensions}", data, compute, cache)["mse"].item()


NORMAL_PRIOR = ("vae", "infovae", "wae")
GAUSSIAN_POSTERIOR = ("vae", "infovae")


def regularity(run: TrainedRun, test_z: Tensor, head: PrototypeHead) -> dict[str, float]:
    """Compare test latents with the normal distributions that samples are drawn from, and clusters with classes.

    With prototypes, or with k-means centres in their place, these are N(v_k, I). For VAEs it is N(0, I). Draws of their
    posterior should follow it, because the means have a smaller spread. A VAE without ``run.posterior`` (images
    (B, C*H*W) -> draws (B, D)) does not get these metrics.
    """
    if run.method in GAUSSIAN_POSTERIOR:
        if run.posterior is None:
            return {}
        test_z = run.posterior(run.data.test_images)
    if run.method in NORMAL_PRIOR:
        measured = functional.latent_metrics(test_z, OnePrior(test_z.shape[1], head.num_prototypes).to(test_z))
    else:
        measured = functional.latent_metrics(test_z, head, run.data.test_labels if run.head else None)
    names = ["r2_per_dim", "effective_rank"]
    if run.head:
        names += ["perplexity", "dead", "duplicates", "purity", "acc", "nmi"]
        names += ["separation"] if run.head.num_prototypes > 1 else []
    row = {name: cast(float, measured[name]) for name in names}
    if run.head:
        assigned = run.head(test_z).argmax(1)
        row["ari"] = float(adjusted_rand_score(run.data.test_labels.cpu().numpy(), assigned.cpu().numpy()))
    return row | {"standardised_mmd": cast(float, measured["mean_standardised_mmd"])}


def purity(clusters: Tensor, labels: Tensor) -> float:
    """The share of examples with the majority label of their cluster."""
    return (contingency(clusters, labels, int(clusters.max()) + 1).amax(1).sum() / len(labels)).item()


def contingency(clusters: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """The number of examples of each class (columns) in each cluster (rows)."""
    classes = int(labels.max()) + 1
    return torch.bincount(clusters * classes + labels, minlength=num_clusters * classes).view(num_clusters, classes)


def majority_classes(assigned: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """The most common class (K,) of each cluster's members, or -1 for an empty cluster."""
    table = contingency(assigned, labels, num_clusters)
    return torch.where(table.sum(1) > 0, table.argmax(1), -1)


def synthesis(
    run: TrainedRun, head: PrototypeHead, train_z: Tensor, subset: Tensor, test_z: Tensor, cache: Path | None = None
) -> dict[str, float]:
    """The classifier's metrics for decoded samples around prototypes (or k-means centres) and from the prior."""
    data, K = run.data, head.num_prototypes
    judge = judge_of(data, cache)
    assigned, labels = head(train_z).argmax(1), data.train_labels[subset]
    majority = majority_classes(assigned, labels, K)
    residuals = (train_z - head.prototypes[assigned]).square()
    counts = torch.bincount(assigned, minlength=K).clamp_min(1)
    own = (torch.zeros_like(head.prototypes).index_add_(0, assigned, residuals) / counts[:, None]).sqrt()

    row = {
        "judge_accuracy": (judge.classes(data.test_images) == data.test_labels).float().mean().item(),
        "control": control(run.decode, head, majority, judge.classes, per_prototype=PER_PROTOTYPE),
        "control_fitted": control(run.decode, head, majority, judge.classes, std=own, per_prototype=PER_PROTOTYPE),
        "prototypes_right": (judge.classes(run.decode(head.prototypes)) == majority).float().mean().item(),
    }
    classes = range(int(data.train_labels.max()) + 1)
    covered = {label: float((majority == label).any()) for label in classes}
    row["classes_covered"] = sum(covered.values())
    if len(classes) <= 10:
        row |= {f"covers_{label}": value for label, value in covered.items()}

    samples = judge.features(run.decode(around(head, PER_PROTOTYPE)))
    real = judge.features(data.train_images[subset])
    row["diversity"] = diversity(samples.unflatten(0, (K, PER_PROTOTYPE)), real, assigned)
    return row | distances(run, test_z, judge.features(data.test_images), real, judge)


def distances(run: TrainedRun, test_z: Tensor, test: Tensor, train: Tensor, judge) -> dict[str, float]:
    """FID of samples, test images (the floor) and reconstructions, and precision and recall of samples.

    The FID compares with training images. Precision and recall compare with test images.
    """
    count = min(IMAGES, len(test), len(train))
    reference, real = train[:count], test[:count]
    samples = judge.features(run.sample(count, torch.Generator().manual_seed(0)))
    precision, recall = precision_recall(real, samples)
    return {
        "fid": frechet_distance(reference, samples),
        "fid_real": frechet_distance(reference, real),
        "fid_reconstruction": frechet_distance(reference, judge.features(run.decode(test_z[:count]))),
        "precision": precision,
        "recall": recall,
    }


def arrays(
    run: TrainedRun, head: PrototypeHead, train_z: Tensor, train_labels: Tensor, test_z: Tensor
) -> dict[str, np.ndarray]:
    """Pictures as bytes (..., C, H, W), and the t-SNE plane."""
    data = run.data
    shown = examples_of_each_class(data.test_labels)
    noise = pixels(run.decode(around(head, DRAWN)), data.shape)
    points = test_z[:TSNE_POINTS]
    plane = tsne(torch.cat([points, head.prototypes]))
    return {
        "prototypes": pixels(run.decode(head.prototypes), data.shape),
        "majority": majority_classes(head(train_z).argmax(1), train_labels, head.num_prototypes).cpu().numpy(),
        "noise": noise.reshape(head.num_prototypes, DRAWN, *data.shape),
        "inputs": pixels(data.test_images[shown], data.shape),
        "reconstructions": pixels(run.decode(test_z[shown]), data.shape),
        "tsne": plane[: len(points)],
        "tsne_prototypes": plane[len(points) :],
        "tsne_labels": data.test_labels[: len(points)].cpu().numpy().astype(np.uint8),
    }


def examples_of_each_class(labels: Tensor, most: int = 10) -> Tensor:
    """The first image of each class, for the first ten classes."""
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()[:most]]
    return torch.tensor(first, device=labels.device)


def pixels(images: Tensor, shape: tuple[int, int, int]) -> np.ndarray:
    """Images in [0, 1] as bytes (n, C, H, W)."""
    return (images.clamp(0, 1) * 255).round().byte().reshape(-1, *shape).cpu().numpy()


def tsne(points: Tensor) -> np.ndarray:
    """The points (N, 2) in half precision, which is enough for a picture."""
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, random_state=0).fit_transform(points.float().cpu().numpy()).astype(np.float16)


def _subset(total: int, count: int) -> Tensor:
    """Random indices, always the same."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[: min(total, count)]
