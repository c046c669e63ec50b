"""The mixture of normals around the prototypes, and the shapes of their clusters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from ._checks import check_floating, check_number, compute_dtype

COVARIANCES = ("low_rank", "full", "diagonal", "isotropic")
FLOOR = 1e-4  # of a cluster's mean variance: no direction has less


class ClusterShapes(NamedTuple):
    """A weight and a normal distribution N(c_k, F_k F_k^T + diag(d_k)) for each of K prototypes.

    ``weights`` (K,) sum to 1. ``centres`` c: (K, D). ``factors`` F: (K, D, r), r >= 1. ``diagonals`` d: (K, D), > 0.
    Of a full covariance the factors are (K, D, D), lower triangular, and the diagonals are 0.
    """

    weights: Tensor
    centres: Tensor
    factors: Tensor
    diagonals: Tensor

    def scaled(self, spread: float) -> ClusterShapes:
        """The same with ``spread`` times the standard deviation in all directions."""
        return self._replace(factors=spread * self.factors, diagonals=spread**2 * self.diagonals)

    def normals(self) -> Distribution:
        """The K normal distributions."""
        _, centres, factors, diagonals = self
        if 1 < factors.shape[1] == factors.shape[2]:
            return MultivariateNormal(centres, scale_tril=factors)
        return LowRankMultivariateNormal(centres, factors, diagonals)

    def draw(self, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """A draw (n, D) of each of the distributions ``index`` (n,)."""
        deviations = self.diagonals[index].sqrt()
        dtype, device = deviations.dtype, deviations.device
        along = torch.randn(len(index), self.factors.shape[2], dtype=dtype, device=device, generator=generator)
        across = torch.randn(deviations.shape, dtype=dtype, device=device, generator=generator)
        drawn = self.centres[index] + deviations * across
        for k in index.unique():  # one at a time, without an (n, D, r) tensor
            own = index == k
            drawn[own] += along[own] @ self.factors[k].mT
        return drawn


def fit_shapes(z: Tensor, nearest: Tensor, prototypes: Tensor, rank: int | None) -> ClusterShapes:
    """The shapes of the clusters of latents ``z`` (N, D), in float64.

    A covariance is ``(n_k C_k + n_0 C) / (n_k + n_0)``: C_k that of the cluster, C that within all clusters, and
    n_0 = D / 2. On held-out latents of the digits and MNIST n_0 = D / 2 was better than 0, D / 8 and 2 D. The ``rank``
    leading directions are kept, at most D / 2, and what they leave of the diagonal. It would understate the last
    directions if it stood for fewer than half. With rank None all is kept. A prototype without latents has weight 0 and
    the covariance C.

    Args:
        nearest: (N,) int64, the prototype of each latent.
        prototypes: (K, D).
    """
    z, centres = z.double(), prototypes.double()
    groups, dim = centres.shape
    counts = torch.bincount(nearest, minlength=groups).to(z.dtype)
    sums = torch.zeros_like(centres).index_add_(0, nearest, z)
    centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    residuals = z - centres[nearest]
    within, prior = residuals.mT @ residuals / len(z), dim / 2
    parts = []
    for k in range(groups):
        own = residuals[nearest == k]
        covariance = (own.mT @ own + prior * within) / (counts[k] + prior)
        parts.append(_full(covariance) if rank is None and dim > 1 else _low_rank(covariance, min(rank or 0, dim // 2)))
    factors, diagonals = map(torch.stack, zip(*parts, strict=True))
    return ClusterShapes(counts / counts.sum(), centres, factors, diagonals)


def _low_rank(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (D, r) and diagonal (D,) of ``covariance`` (D, D); with rank 0 one column of zeros, as torch asks."""
    factors, variances = torch.zeros_like(covariance[:, : max(rank, 1)]), covariance.diagonal()
    if rank:
        values, vectors = torch.linalg.eigh(covariance)
        factors = vectors[:, -rank:] * values[-rank:].clamp_min(0).sqrt()
    return factors, torch.maximum(variances - factors.square().sum(1), _least(variances))


def _full(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor (D, D) of ``covariance`` (D, D), and zeros (D,)."""
    variances = covariance.diagonal()
    return torch.linalg.cholesky(covariance + _least(variances).diag_embed()), torch.zeros_like(variances)


def _least(variances: Tensor) -> Tensor:
    """(D,) the least variance that a direction has. Latents that all coincide have none: a tiny one stands in."""
    return (FLOOR * variances.mean()).clamp_min(torch.finfo(torch.float32).tiny).expand_as(variances)


class PrototypeMixture(MixtureSameFamily):
    """The mixture of normals around the prototypes as a ``torch.distributions`` object.

    ``-log_prob(z)`` is an out-of-distribution score. ``responsibilities(z)`` (..., K) is the posterior over prototypes.

    Args:
        prototypes: (K, D).
        std: without ``shapes`` the mixture is sum_k N(v_k, std^2 I) / K.
        shapes: a weight, a centre and a covariance for each prototype, as :meth:`PrototypeHead.fit` learns them.
    """

    def __init__(self, prototypes: Tensor, std: float = 1.0, shapes: ClusterShapes | None = None) -> None:
        self.std, self.shapes = check_number("std", std, above=0), shapes
        if shapes is None:
            weights = prototypes.new_ones(len(prototypes))
            super().__init__(Categorical(weights), Independent(Normal(prototypes, self.std), 1))
            return
        super().__init__(Categorical(shapes.weights), shapes.normals())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (...,) of ``value`` (..., D)."""
        return self._joint(value).logsumexp(-1)

    def responsibilities(self, value: Tensor) -> Tensor:
        """Posterior probability (..., K) of each prototype given ``value`` (..., D)."""
        return self._joint(value).softmax(-1)

    def _joint(self, value: Tensor) -> Tensor:
        """log of weight times density, (..., K), without the (..., K, D) tensor of the general mixture."""
        mean = self.component_distribution.mean
        check_floating("value", value)
        if value.ndim == 0 or value.shape[-1] != mean.shape[-1]:
            raise ValueError(
                f"value: expected shape (..., {mean.shape[-1]}), got {tuple(value.shape)}. Put the latent axis last."
            )
        dtype = compute_dtype(torch.promote_types(value.dtype, mean.dtype))
        mean, flat = mean.to(dtype), value.reshape(-1, mean.shape[-1]).to(dtype)
        if self.shapes is not None:
            # One prototype at a time, without an (N, K, D) tensor.
            parts = ClusterShapes(*(part.to(dtype) for part in self.shapes))
            one_by_one = (ClusterShapes(*(part[k : k + 1] for part in parts)) for k in range(len(mean)))
            densities = [one.normals().log_prob(flat) for one in one_by_one]
            joint = torch.stack(densities, -1) + self.mixture_distribution.logits.to(dtype)
            return joint.reshape(*value.shape[:-1], len(mean))
        # By differences: the product form is not exact in float32 far from the origin.
        distance = torch.cdist(flat, mean, compute_mode="donot_use_mm_for_euclid_dist")
        log_density = self.component_distribution.log_prob(mean)  # at distance 0, the normalising constant
        joint = log_density + self.mixture_distribution.logits - 0.5 * (distance / self.std).square()
        return joint.reshape(*value.shape[:-1], len(mean))


def kmeans(z: Tensor, count: int, generator: torch.Generator | None, iterations: int = 50) -> Tensor:
    """Centres (count, D) of ``z`` (N, D) by k-means (Lloyd, 1982), from k-means++. A centre without rows stays."""
    z = z.to(compute_dtype(z.dtype))
    centres, nearest = z[kmeans_plus_plus(z, count, generator)], z.new_full((len(z),), -1, dtype=torch.int64)
    for _ in range(iterations):
        before, nearest = nearest, torch.cdist(z, centres).argmin(1)
        if torch.equal(before, nearest):
            break
        counts = torch.bincount(nearest, minlength=count)[:, None]
        means = torch.zeros_like(centres).index_add_(0, nearest, z) / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres)
    return centres


def kmeans_plus_plus(z: Tensor, count: int, generator: torch.Generator | None, centres: Tensor | None = None) -> Tensor:
    """Indices (count,) of rows of ``z`` (N, D), by k-means++.

    A row's probability is proportional to its squared distance from the nearest row that was drawn before, or from the
    nearest of ``centres`` (M, D).
    """
    # Only ratios of distances matter. At unit size no distance overflows, in any dtype.
    z = z.to(compute_dtype(z.dtype))
    there = z[:0] if centres is None else centres.to(z.dtype)
    top = torch.cat([z, there]).abs().amax().clamp_min(torch.finfo(z.dtype).tiny)
    z, there, chosen = z / top, there / top, []
    if len(there) == 0:
        chosen.append(torch.randint(len(z), (1,), device=z.device, generator=generator))
        there = z[chosen[0]]
    squared = torch.full_like(z[:, 0], torch.inf)
    for centre in there:
        squared = torch.minimum(squared, (z - centre).square().sum(1))
    while len(chosen) < count:
        # All latents on chosen points already: any row is as good as another.
        weight = squared + (squared.sum() == 0)
        chosen.append(torch.multinomial(weight, 1, generator=generator))
        squared = torch.minimum(squared, (z - z[chosen[-1]]).square().sum(1))
    return torch.cat(chosen)
