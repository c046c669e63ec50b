"""The three kernels of the anchored MMD and their expectations under N(0, I), in closed form.

Everything is written for residuals r = z - v against y, y' ~ N(0, I) in D dimensions. The kernels are functions of
squared distances. So each function returns a value and its derivative by the squared distance:

* ``pair``: k and k' at squared distances |r_i - r_j|^2;
* ``attraction``: a(r) = E_y k(r, y) and its derivative by |r|^2;
* ``self_term``: b = E k(y, y'), a number.

Gaussian: exp(-d^2 / (2 s^2)) with s^2 = D * scale.  IMQ: C / (C + d^2) with C = 2 D * scale.  Both are averaged over
the scales.  Energy: -d, which has no scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

KERNELS = ("gaussian", "imq", "energy")


def pair(kernel: str, squared: Tensor, dim: int, scales: Sequence[float]) -> tuple[Tensor, Tensor]:
    """k and dk/d(squared) at ``squared`` (any shape, >= 0)."""
    if kernel == "gaussian":
        return _gaussian_pair(squared, [dim * s for s in scales])
    if kernel == "imq":
        k, slope = torch.zeros_like(squared), torch.zeros_like(squared)
        for scale in scales:
            c = 2 * dim * scale
            inverse = (squared + c).reciprocal_()
            k.add_(inverse, alpha=c / len(scales))
            slope.addcmul_(inverse, inverse, value=-c / len(scales))
        return k, slope
    distance = squared.sqrt()
    # Coinciding points have no direction: their slope is 0, the middle of the subdifferential.
    return -distance, torch.where(distance > 0, -0.5 / distance, 0.0)


def _gaussian_pair(squared: Tensor, variances: Sequence[float]) -> tuple[Tensor, Tensor]:
    k, slope = torch.zeros_like(squared), torch.zeros_like(squared)
    previous, e = None, squared
    for variance in sorted(variances, reverse=True):
        # Half the variance squares the exponential: the default scales cost one exp, not six.
        e = e * e if previous == 2 * variance else (squared * (-0.5 / variance)).exp_()
        previous = variance
        k.add_(e, alpha=1 / len(variances))
        slope.add_(e, alpha=-0.5 / (variance * len(variances)))
    return k, slope


def attraction(kernel: str, squared: Tensor, dim: int, scales: Sequence[float]) -> tuple[Tensor, Tensor]:
    """a = E_y k(r, y), y ~ N(0, I), and da/d|r|^2 at ``squared`` = |r|^2 (any shape)."""
    value, slope = torch.zeros_like(squared), torch.zeros_like(squared)
    if kernel == "gaussian":
        for scale in scales:
            s2 = dim * scale
            a = (squared * (-0.5 / (s2 + 1))).exp_() * ((s2 / (s2 + 1)) ** (dim / 2) / len(scales))
            value.add_(a)
            slope.add_(a, alpha=-0.5 / (s2 + 1))
        return value, slope
    if kernel == "imq":
        # C / (C + d^2) is a mixture of exp(-t d^2) over t ~ Exp(C).
        for scale in scales:
            for t, weight in _imq_nodes(2 * dim * scale):
                shrink = t / (1 + 2 * t)
                a = (squared * -shrink).exp_() * (weight * (1 + 2 * t) ** (-dim / 2) / len(scales))
                value.add_(a)
                slope.add_(a, alpha=-shrink)
        return value, slope
    return _energy_attraction(squared, dim)


def _energy_attraction(squared: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """-E|r - y| from sqrt(w) = int (1 - e^{-tw}) t^{-3/2} dt / (2 sqrt(pi)) and E e^{-t |r - y|^2}.

    sqrt(c), c = D + |r|^2, is taken out of both integrals: what remains is small and converges fast in log(t c).
    It is computed in float64: in float32 the exponents' rounding errors are equal for all rows, and add up.
    """
    dtype = squared.dtype
    squared = squared if squared.device.type == "mps" else squared.double()  # which has no float64
    c = squared + dim
    value, slope = torch.ones_like(squared), 0.5 / c
    for node, weight in _energy_nodes():
        t = node / c
        shrink = t / (1 + 2 * t)
        laplace = (-shrink * squared - (dim / 2) * torch.log1p(2 * t)).exp_()
        value.add_(math.exp(-node) - laplace, alpha=weight)
        slope.add_(shrink * laplace - math.exp(-node) * t, alpha=weight)
    root = c.sqrt()
    return (-root * value).to(dtype), (-root * slope).to(dtype)


def self_term(kernel: str, dim: int, scales: Sequence[float]) -> float:
    """b = E k(y, y'), y and y' ~ N(0, I)."""
    if kernel == "energy":
        return -2 * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))
    if kernel == "gaussian":
        return sum((s / (s + 2 / dim)) ** (dim / 2) for s in scales) / len(scales)
    terms = (weight * (1 + 4 * t) ** (-dim / 2) for s in scales for t, weight in _imq_nodes(2 * dim * s))
    return math.fsum(terms) / len(scales)


def diagonal(kernel: str) -> float:
    """k(r, r)."""
    return 0.0 if kernel == "energy" else 1.0


def gaussian_null_variance(n: Tensor, dim: int, scales: Sequence[float]) -> Tensor:
    """Variance of the unbiased statistic of n true N(0, I) samples under the averaged Gaussian kernel.

    2 / (n (n - 1)) E h^2 with h the degenerate kernel k(y, y') - a(y) - a(y') + b, so E h^2 = E k^2 - 2 E a^2 + b^2.
    """
    kk = aa = 0.0
    for s in (dim * scale for scale in scales):
        for t in (dim * scale for scale in scales):
            both = s * t / (s + t)
            kk += (both / (both + 2)) ** (dim / 2)
            rate = 1 / (s + 1) + 1 / (t + 1)
            aa += (s / (s + 1) * t / (t + 1) / (1 + rate)) ** (dim / 2)
    count = len(scales) ** 2
    h2 = kk / count - 2 * aa / count + self_term("gaussian", dim, scales) ** 2
    return 2 * h2 / (n * (n - 1))


@lru_cache(maxsize=256)
def _imq_nodes(c: float) -> tuple[tuple[float, float], ...]:
    """Trapezoid in log t for int C e^{-Ct} f(t) dt: errors below 1e-9."""
    step = 0.4
    grid = [math.exp(-21 + step * i) for i in range(62)]
    return tuple((x / c, step * x * math.exp(-x)) for x in grid)


@lru_cache(maxsize=1)
def _energy_nodes() -> tuple[tuple[float, float], ...]:
    step = 0.35
    grid = [math.exp(-15 + step * i) for i in range(104)]
    return tuple((s, step * s**-0.5 / (2 * math.sqrt(math.pi))) for s in grid)
