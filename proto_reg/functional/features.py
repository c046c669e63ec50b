"""The anchored MMD by random Fourier features: its time is linear in the latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._distributed import sum_
from .._random import normal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def feature_mmd(
    residuals: Tensor,
    groups: Tensor,
    num_groups: int,
    scales: Sequence[float],
    unbiased: bool,
    features: int,
    seed: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared MMD between each group of residuals and N(0, I) under the Gaussian kernel, and its gradient.

    For each frequency w of the kernel's spectrum, with phi = (1/n) sum_i exp(i w.r_i) and c = exp(-|w|^2 / 2):
    ``(n |phi|^2 - 1) / (n - 1) - 2 Re(phi) c + c^2`` (U) or ``|phi - c|^2`` (V). Its mean over the spectrum is the
    exact statistic. The sums over all ranks of ``group`` are num_groups * (2 * features + 1) numbers.

    Args:
        residuals: (N, D) latents minus their anchors.
        groups: (N,) int64, the cluster of each row; -1 leaves the row out.

    Returns:
        values: (num_groups,), exactly 0 for groups of fewer than two rows.
        gradient: (N, D) of ``values[groups[i]]`` by ``residuals[i]``.
        counts: (num_groups,) rows of each group.
    """
    with torch.autocast(residuals.device.type, enabled=False):
        w, share = frequencies(residuals, features, scales, seed)
        inside = (groups >= 0)[:, None]
        slot = torch.where(inside[:, 0], groups, num_groups)
        phase = torch.where(inside, residuals, 0.0) @ w.T
        cos, sin = phase.cos(), phase.sin()
        rows = torch.cat([cos, sin, torch.ones_like(phase[:, :1])], 1)
        sums = sum_(rows.new_zeros(num_groups + 1, rows.shape[1]).index_add_(0, slot, rows)[:-1], group)

        n = sums[:, -1:]
        alive, size = n > 1, n.clamp_min(2)
        real, imaginary = (part / size for part in sums[:, :-1].split(features, 1))
        c = (-0.5 * w.square().sum(1)).exp()
        squared = real.square() + imaginary.square()
        pairs = (size * squared - 1) / (size - 1) if unbiased else squared
        values = torch.where(alive[:, 0], (pairs - 2 * real * c + c.square()) @ share, 0.0)

        twice = 2 * size / (size - 1) if unbiased else 2.0
        scale = torch.where(alive, share / size, 0.0)
        by_cos, by_sin = (twice * real - 2 * c) * scale, twice * imaginary * scale
        index = torch.where(inside[:, 0], groups, 0)
        gradient = torch.where(inside, (by_sin[index] * cos - by_cos[index] * sin) @ w, 0.0)
        return values, gradient, n[:, 0]


def frequencies(like: Tensor, features: int, scales: Sequence[float], seed: int) -> tuple[Tensor, Tensor]:
    """Frequencies (features, D) of the kernel averaged over ``scales``, and their shares (features,), which sum to 1.

    They take the scales in turns: w ~ N(0, I / (D s)). They depend on ``seed`` alone, so they are equal on all ranks.
    """
    dim = like.shape[1]
    counter = torch.arange(features * dim, device=like.device) + (seed % 2**31) * 0x5851F42D
    w = normal(counter).to(like.dtype).reshape(features, dim)
    share = like.new_empty(features)
    for i, scale in enumerate(scales):
        w[i :: len(scales)] *= (dim * scale) ** -0.5
        share[i :: len(scales)] = 1 / (len(scales) * len(range(i, features, len(scales))))
    return w, share
