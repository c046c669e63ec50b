"""The metrics of a trained model that samples from its best prior: a row of the table, and its curve along the spread.

``TrainedRun.sample`` has no part in this. It samples as the paper does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor

from .metrics import DRAWN, IMAGES, PER_PROTOTYPE, SUBSET, _subset, pixels
from .priors import Mixture, isotropic
from .synthesis import Judge, diversity, frechet_distance, judge_of, precision_recall
from .trained import TrainedRun

SPREADS = (0.4, 0.55, 0.7, 0.85, 1.0, 1.1, 1.2)
CURVE_IMAGES = 2_000  # samples, and real images, at each spread


@torch.no_grad()
def evaluate_prior(
    run: TrainedRun, prior: Mixture, *, cache: Path | None = None, far: tuple[str, Tensor] | None = None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The metrics of ``run`` with samples of ``prior``, and the pictures for figure 4.

    Args:
        cache: the folder for results that depend only on the data set.
        far: the name of another data set and its images (M, C*H*W). Its latents should have a low density.
    """
    data, judge = run.data, judge_of(run.data, cache)
    subset = _subset(len(data.train_images), SUBSET).to(data.train_images.device)
    train_z, test_z = run.encode(data.train_images[subset]), run.encode(data.test_images)
    belonging = prior.belonging(train_z)
    majority = majority_classes(belonging, data.train_labels[subset].cpu())
    squared = prior.squared_distances(test_z)
    own = squared.gather(1, prior.belonging(test_z, squared).argmax(1, keepdim=True))
    row = {
        "test_mse": F.mse_loss(run.decode(test_z), data.test_images).item(),
        "log_likelihood": prior.joint(squared).logsumexp(1).mean().item(),
        "whitened_r2": own.mean().item() / test_z.shape[1],
        "judge_accuracy": (judge.classes(data.test_images) == data.test_labels).float().mean().item(),
        "control": control(run, prior, majority, judge, PER_PROTOTYPE),
    }
    train, test = judge.features(data.train_images[subset]), judge.features(data.test_images)
    around = judge.features(run.decode(_around(prior, PER_PROTOTYPE)))
    clusters = belonging.argmax(1).to(train.device)
    row["diversity"] = diversity(around.unflatten(0, (len(prior.weights), PER_PROTOTYPE)), train, clusters)
    row |= distances(run, prior, train_z, train, test, judge) | curve(run, prior, majority, test, judge)
    if far is not None:
        row |= out_of_distribution(run, prior, test_z, *far)
    return row, pictures(run, prior, majority)


def majority_classes(belonging: Tensor, labels: Tensor) -> Tensor:
    """The most common class (K,) of each cluster, from the shares (N, K) of its members; -1 for an empty cluster."""
    table = belonging.T @ F.one_hot(labels).double()
    return torch.where(table.sum(1) > 0, table.argmax(1), -1)


def _around(prior: Mixture, each: int, spread: float = 1.0) -> Tensor:
    """Latents (K * each, D), component by component. Every call has the same noise."""
    index = torch.arange(len(prior.weights)).repeat_interleave(each)
    return prior.draw(index, Generator().manual_seed(0), spread)


def _samples(run: TrainedRun, prior: Mixture, n: int, spread: float = 1.0) -> Tensor:
    """``n`` images of the prior. Every call has the same noise."""
    generator = Generator().manual_seed(0)
    return run.decode(prior.draw(prior.components(n, generator), generator, spread))


def control(run: TrainedRun, prior: Mixture, majority: Tensor, judge: Judge, each: int, spread: float = 1.0) -> float:
    """The share of samples around a component that the judge gives to its cluster's majority class. All K count."""
    found = judge.classes(run.decode(_around(prior, each, spread))).cpu()
    return (found == majority.repeat_interleave(each)).float().mean().item()


def distances(
    run: TrainedRun, prior: Mixture, train_z: Tensor, train: Tensor, test: Tensor, judge: Judge
) -> dict[str, float]:
    """FID, precision and recall of samples, and of other decoded training latents, which are the ceiling.

    As in ``metrics``, the FID compares with training images. Precision and recall compare with test images.
    """
    count = min(IMAGES, len(test), len(train) // 2)
    reference, real = train[:count], test[:count]
    sources = {"": _samples(run, prior, count), "ceiling_": run.decode(train_z[-count:])}
    row = {"fid_real": frechet_distance(reference, real)}
    for name, images in sources.items():
        features = judge.features(images)
        precision, recall = precision_recall(real, features)
        row |= {
            f"{name}fid": frechet_distance(reference, features),
            f"{name}precision": precision,
            f"{name}recall": recall,
        }
    return row


def curve(run: TrainedRun, prior: Mixture, majority: Tensor, test: Tensor, judge: Judge) -> dict[str, float]:
    """Control and recall at each spread of the draw, from the same noise."""
    real, each = test[:CURVE_IMAGES], -(-CURVE_IMAGES // len(prior.weights))
    row = {}
    for spread in SPREADS:
        features = judge.features(_samples(run, prior, len(real), spread))
        row[f"recall@{spread:g}"] = precision_recall(real, features)[1]
        row[f"control@{spread:g}"] = control(run, prior, majority, judge, each, spread)
    return row


def out_of_distribution(run: TrainedRun, prior: Mixture, test_z: Tensor, name: str, images: Tensor) -> dict[str, float]:
    """The AUROC of -log_prob, which should be higher for another data set's ``images`` than for test images.

    Our layer has a second one, for the mixture N(v, std^2 I) that its training aims at.
    """
    far_z = run.encode(images[: len(test_z)].to(run.data.test_images.device))
    is_far = np.repeat([0, 1], [len(test_z), len(far_z)])
    priors = {"auroc": prior}
    if run.method == "balanced" and run.head is not None:
        priors["auroc, N(v, I)"] = isotropic(run.head)
    scores = {key: -torch.cat([some.log_prob(test_z), some.log_prob(far_z)]) for key, some in priors.items()}
    return {f"{key}: {name}": float(roc_auc_score(is_far, score.numpy())) for key, score in scores.items()}


def pictures(run: TrainedRun, prior: Mixture, majority: Tensor) -> dict[str, np.ndarray]:
    """Figure 4: decoded prototypes, or else the centres, and samples around each, as bytes (..., C, H, W)."""
    shown, shape = run.head.prototypes if run.head is not None else prior.centres.float(), run.data.shape
    drawn = pixels(run.decode(_around(prior, DRAWN)), shape)
    return {
        "prototypes": pixels(run.decode(shown), shape),
        "majority": majority.numpy(),
        "noise": drawn.reshape(len(prior.weights), DRAWN, *shape),
    }
