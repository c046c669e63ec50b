"""The best prior of each trained model: a mixture of K normals that is fitted to its training latents."""

from __future__ import annotations

import math
import warnings
from copy import deepcopy

import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from proto_reg import PrototypeHead

PRIORS = ("clusters", "trained", "gmm")
# On MNIST (D = 256, K = 30) EM has converged after three iterations: nine more change the held-out likelihood by .02
# nats. 20,000 latents have 14 nats more than 10,000. Their fit takes 30 to 50 s of one core.
GMM_LATENTS = 20_000
GMM_ITERATIONS = 3
# Added to each variance, as a share of the mean variance of the latents. EM runs with the first, which is the floor of
# PrototypeHead.fit, too. The one with the highest likelihood of held-out training latents is taken: on the digits, with
# 43 latents for each covariance in 32 dimensions, .01 has 19 nats more than .0001. None is smaller: an autoencoder on
# MNIST leaves some 70 of 256 directions empty, so there every tenth of the floor would add 78 nats, without a bound.
GMM_FLOORS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)
GMM_HELD_OUT = 2_000  # training latents that choose the floor, at most a tenth of all


class Mixture:
    """sum_k w_k N(c_k, S_k) in float64 on the CPU.

    Args:
        weights: w (K,), which sum to 1. centres: c (K, D). covariances: S (K, D, D), positive definite.
        head: the prototypes whose clusters the normals describe. A latent belongs to the one with its highest score.
            None: it belongs to each normal by its responsibility.
    """

    def __init__(
        self, weights: Tensor, centres: Tensor, covariances: Tensor, head: PrototypeHead | None = None
    ) -> None:
        self.weights, self.centres, self.head = weights.double(), centres.double(), head
        self.factors = torch.linalg.cholesky(covariances.double())

    def components(self, n: int, generator: torch.Generator) -> Tensor:
        """The normal (n,) of each of ``n`` draws, by the weights."""
        return torch.multinomial(self.weights, n, replacement=True, generator=generator)

    def draw(self, index: Tensor, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        """A draw (n, D), float32, of each of the normals ``index`` (n,). All their deviations are times ``spread``."""
        noise = torch.randn(len(index), self.centres.shape[1], dtype=torch.float64, generator=generator)
        drawn = self.centres[index]
        for k in index.unique():
            drawn[index == k] += spread * noise[index == k] @ self.factors[k].mT
        return drawn.float()

    def squared_distances(self, z: Tensor) -> Tensor:
        """The squared Mahalanobis distance (N, K) of each latent ``z`` (N, D) from each centre."""
        z, columns = z.cpu().double(), []
        for centre, factor in zip(self.centres, self.factors, strict=True):
            columns.append(torch.linalg.solve_triangular(factor, (z - centre).mT, upper=False).square().sum(0))
        return torch.stack(columns, 1)

    def joint(self, squared: Tensor) -> Tensor:
        """The log of weight times density (N, K), from the squared distances (N, K)."""
        log_scale = self.factors.diagonal(dim1=1, dim2=2).log().sum(1) + self.centres.shape[1] / 2 * math.log(
            2 * math.pi
        )
        return self.weights.log() - log_scale - squared / 2

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density (N,) of ``z`` (N, D), in nats."""
        return self.joint(self.squared_distances(z)).logsumexp(1)

    def belonging(self, z: Tensor, squared: Tensor | None = None) -> Tensor:
        """The share (N, K) with which each latent belongs to each normal. ``squared``: its distances, if known."""
        if self.head is None:
            return self.joint(self.squared_distances(z) if squared is None else squared).softmax(1)
        return F.one_hot(self.head(z.cpu()).argmax(1), len(self.weights)).double()


def fit_prior(prior: str, z: Tensor, head: PrototypeHead | None, components: int, seed: int) -> Mixture:
    """The prior "clusters" (around ``head``) or "gmm" (of ``components`` normals), fitted to latents ``z`` (N, D).

    The prior "trained" is that of ``head`` after training, which nobody has fitted to anything.
    """
    if prior == "gmm":
        return fit_gmm(z.cpu(), components, seed)
    assert head is not None  # the config is checked
    return of_head(head, z.cpu() if prior == "clusters" else None)


def of_head(head: PrototypeHead, z: Tensor | None) -> Mixture:
    """A weight, a centre and a covariance for each cluster of ``head``; of latents ``z`` (N, D) if they are given."""
    head = deepcopy(head).cpu()
    if z is not None:
        head.fit(z)
    shapes = head.shapes
    assert shapes is not None
    factors, diagonals = shapes.factors.double(), shapes.diagonals.double()
    return Mixture(shapes.weights, shapes.centres, factors @ factors.mT + diagonals.diag_embed(), head)


def fit_gmm(z: Tensor, components: int, seed: int) -> Mixture:
    """A mixture of normals with full covariances, by EM in float64, as Ghosh et al. (2020) fit it to an autoencoder.

    It starts from k-means. The latents are in random order. GMM_LATENTS and GMM_ITERATIONS keep it cheap. GMM_FLOORS
    keeps it from overfitting.
    """
    held = z[-min(GMM_HELD_OUT, -(-len(z) // 10)) :]
    some = z[: min(GMM_LATENTS, len(z) - len(held))].double()
    unit = some.var(0).mean().item()
    gmm = GaussianMixture(components, reg_covar=GMM_FLOORS[0] * unit, max_iter=GMM_ITERATIONS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        gmm.fit(some.numpy())
    weights, centres, covariances = map(torch.from_numpy, (gmm.weights_, gmm.means_, gmm.covariances_))
    eye = torch.eye(z.shape[1], dtype=torch.float64)
    fits = [Mixture(weights, centres, covariances + (floor - GMM_FLOORS[0]) * unit * eye) for floor in GMM_FLOORS]
    return max(fits, key=lambda fit: fit.log_prob(held).mean().item())


def isotropic(head: PrototypeHead) -> Mixture:
    """The mixture that training aims at: sum_k N(v_k, std^2 I) / K."""
    K, D = head.prototypes.shape
    covariances = (head.std**2 * torch.eye(D)).expand(K, D, D)
    return Mixture(torch.full((K,), 1 / K), head.prototypes.detach().cpu(), covariances, deepcopy(head).cpu())
