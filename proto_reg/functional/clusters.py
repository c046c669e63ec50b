"""Prototypes as clusters: how many there should be, which belong together, and which examples lie nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal

from .._checks import check_head, check_matrix, check_positive_int, compute_dtype
from ..mixture import FLOOR, PrototypeMixture, fit_shapes

if TYPE_CHECKING:
    import numpy as np

RANK = 16  # as a head has it
CANDIDATES = (5, 10, 15, 20, 30, 50, 70, 100)
HELD_OUT = 5  # every fifth latent
JUDGED = 2000  # latents of the silhouette, whose time is quadratic in them


class PrototypeCounts(NamedTuple):
    """What :func:`choose_num_prototypes` found for each of the n candidates.

    ``by_silhouette``: the K with the highest silhouette. ``by_likelihood``: the smallest K whose log-likelihood is
    below the highest by at most one standard error of their difference.

    ``candidates`` (n,) int64, rising. ``log_likelihood`` (n,): mean over the held-out latents, in nats.
    ``standard_error`` (n,): of its difference from the highest. ``silhouette`` (n,): mean over held-out latents, in
    [-1, 1]; NaN for K = 1. These three are float64.
    """

    by_silhouette: int
    by_likelihood: int
    candidates: Tensor
    log_likelihood: Tensor
    standard_error: Tensor
    silhouette: Tensor


@torch.no_grad()
def choose_num_prototypes(latents: Tensor, candidates: Sequence[int] = CANDIDATES, *, seed: int = 0) -> PrototypeCounts:
    """Try numbers of prototypes K on ``latents`` (N, D) of any encoder.

    A fifth of the latents is held out. k-means clusters the others for each K, and each cluster gets a normal
    distribution as in :meth:`proto_reg.PrototypeHead.fit`, with rank 16, at most D / 2. Two figures judge the held-out
    latents:

    * The mean silhouette (Rousseeuw, 1987). It is highest where clusters stand apart best: a K for kinds that you can
      name. It hardly depends on N.
    * The log-likelihood under the mixture. It rises with K while smaller clusters still describe new latents: a K for
      samples. The rule of one standard error (Breiman et al., 1984) chooses. It does not count the kinds in the data:
      it grows with N, and may be the largest candidate.

    Every K between the two is sound. Neither figure knows your labels. Time grows with N and with the sum of the
    candidates.

    Args:
        candidates: the K to try, in any order. Each is at least 1 and at most 4/5 of N.
        seed: of the split and of k-means.

    Raises:
        TypeError, ValueError: fewer than 10 latents, latents that are not finite, or a candidate out of its range.
        ImportError: without the extra ``metrics`` (scikit-learn).
    """
    z = check_matrix("latents", latents, axes="(N, D)").detach().cpu()
    z = z.to(compute_dtype(z.dtype))
    if len(z) < 2 * HELD_OUT:
        raise ValueError(f"latents: expected at least {2 * HELD_OUT} rows, got {len(z)}. Encode more of the data.")
    if not bool(z.isfinite().all()):
        raise ValueError("latents: expected finite numbers, got NaN or infinity. Look for the overflow upstream.")
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed), device="cpu")
    held_out, rest = z[order[: len(z) // HELD_OUT]], z[order[len(z) // HELD_OUT :]]
    tried = _checked_candidates(candidates, len(rest))
    results = [_judge(rest, held_out, count, seed) for count in tried]
    densities = torch.stack([density for density, _ in results])
    mean = densities.mean(1)
    behind = densities[mean.argmax()] - densities
    error = behind.std(1) / behind.shape[1] ** 0.5
    likely = int((behind.mean(1) <= error).int().argmax())
    silhouette = torch.tensor([value for _, value in results], dtype=torch.float64, device="cpu")
    apart = int(silhouette.nan_to_num(-1).argmax())
    return PrototypeCounts(
        tried[apart], tried[likely], torch.tensor(tried, dtype=torch.int64, device="cpu"), mean, error, silhouette
    )


def _checked_candidates(candidates: Sequence[int], most: int) -> list[int]:
    """The candidates, rising, each once."""
    tried = sorted({check_positive_int("candidates", count) for count in candidates})
    if not tried or tried[-1] > most:
        raise ValueError(
            f"candidates: expected at least one, each at most {most}, the number of latents that are not held out, got "
            f"{list(candidates)}. Encode more data, or try fewer prototypes."
        )
    return tried


def _judge(z: Tensor, held_out: Tensor, count: int, seed: int) -> tuple[Tensor, float]:
    """The log-likelihood (n,) of each held-out latent in float64, and the mean silhouette of at most ``JUDGED``."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise ImportError("choose_num_prototypes needs scikit-learn. Run: pip install 'proto_reg[metrics]'") from error
    clusters = KMeans(count, n_init=1, random_state=seed).fit(z.numpy())
    nearest = torch.tensor(clusters.labels_, dtype=torch.int64, device=z.device)
    centres = torch.tensor(clusters.cluster_centers_, dtype=z.dtype, device=z.device)
    shapes = fit_shapes(z, nearest, centres, RANK)
    density = PrototypeMixture(centres, shapes=shapes).log_prob(held_out.double())
    judged = held_out[:JUDGED].numpy()
    found = clusters.predict(judged)
    apart = 1 < len(set(found.tolist())) < len(judged)
    return density, float(silhouette_score(judged, found)) if apart else float("nan")


@torch.no_grad()
def prototype_hierarchy(head: nn.Module) -> np.ndarray:
    """Merge the prototypes of a head by the overlap of their normal distributions.

    The distance of two prototypes is the Bhattacharyya distance of N(c_i, S_i) and N(c_j, S_j), the head's
    ``shapes``. Groups merge by their mean distance (average linkage).
    ``scipy.cluster.hierarchy.cut_tree(tree, n)[:, 0]`` cuts the result to n groups: the group (K,) of each prototype.
    Give a latent the group of its most probable prototype, ``head.mixture().responsibilities(z).argmax(-1)``: it fits
    the normals better than the highest score does.

    Returns:
        A linkage matrix (K - 1, 4) float64 in SciPy's format.

    Raises:
        TypeError, ValueError: no head, a head without shapes, or fewer than two prototypes.
        ImportError: without the extra ``metrics`` (SciPy).
    """
    check_head(head)
    shapes = getattr(head, "shapes", None)
    if shapes is None:
        raise ValueError("head: expected a fitted head, got one without shapes. Call head.fit(latents) before.")
    if len(shapes.centres) < 2:
        raise ValueError("head: expected at least two prototypes, got 1. There is nothing to merge.")
    try:
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import squareform
    except ImportError as error:
        raise ImportError("prototype_hierarchy needs SciPy. Run: pip install 'proto_reg[metrics]'") from error
    centres, factors, diagonals = (part.detach().double() for part in shapes[1:])
    variances = factors.square().sum(2) + diagonals
    diagonals = torch.maximum(diagonals, FLOOR * variances.mean(1, keepdim=True))  # a full covariance has none
    distances = _bhattacharyya(centres, factors, diagonals).cpu().numpy()
    return linkage(squareform(distances, checks=False), method="average")


def _bhattacharyya(centres: Tensor, factors: Tensor, diagonals: Tensor) -> Tensor:
    """(K, K) distances of K normals: m / 8 + H(S) - (H_i + H_j) / 2, with S the mean of both covariances.

    H is the entropy, and m the squared Mahalanobis distance of the centres under S. S has low rank as well.
    """
    entropies = LowRankMultivariateNormal(centres, factors, diagonals).entropy()
    rows = []
    for centre, factor, diagonal, entropy in zip(centres, factors, diagonals, entropies, strict=True):
        both = torch.cat([factors, factor.expand_as(factors)], -1) / 2**0.5
        between = LowRankMultivariateNormal(centres, both, (diagonals + diagonal) / 2)
        mahalanobis = 2 * (between.log_prob(centres) - between.log_prob(centre))
        rows.append(mahalanobis / 8 + between.entropy() - (entropies + entropy) / 2)
    distances = torch.stack(rows).clamp_min(0)  # rounding
    return ((distances + distances.mT) / 2).fill_diagonal_(0)


@torch.no_grad()
def nearest_examples(head: nn.Module, latents: Tensor, n: int) -> Tensor:
    """Indices (K, n) int64 of the ``n`` latents nearest to each prototype, the nearest first.

    Only the prototype's own latents count: those that score highest with it. A prototype with fewer than ``n`` has -1
    in the places that are left.

    Args:
        head: a :class:`proto_reg.PrototypeHead`, or any module with ``prototypes`` (K, D) that maps latents to scores
            (N, K).
        latents: (N, D).

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """
    check_head(head)
    check_positive_int("n", n)
    prototypes = cast(Tensor, head.prototypes).detach()
    z = check_matrix("latents", latents, prototypes.shape[1], axes="(N, D)").detach()
    owner = head(z).argmax(1)
    dtype = compute_dtype(torch.promote_types(z.dtype, prototypes.dtype))
    distances = (z.to(dtype) - prototypes.to(dtype)[owner]).square().sum(1)
    examples = torch.full((len(prototypes), n), -1, dtype=torch.int64, device=z.device)
    for k in range(len(prototypes)):
        own = (owner == k).nonzero()[:, 0]
        near = own[distances[own].argsort(stable=True)[:n]]
        examples[k, : len(near)] = near
    return examples
