"""Balanced assignment of the rows of all ranks as one batch: plain torch with all-reduced column sums.

Potentials come from all-reduces alone, so they are equal on all ranks to the bit. Every rank makes the same calls in
the same order, whatever the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._distributed import size, sum_
from .sinkhorn_log import balance_logits
from .sinkhorn_reference import cross_entropy_of_rows, isolated, normalised, usable_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def sinkhorn_over_group(
    group: ProcessGroup,
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
) -> tuple[Tensor, Tensor]:
    """Codes of this rank's rows (..., B, K) and the potentials of all ranks (..., K); arguments as in one process."""
    x, weights, usable = usable_rows(scores, marginals, weights, isolate)
    codes, potentials = balance_logits(x, normalised(marginals, x), weights, epsilon, num_iters, tol, group)
    codes = isolated(codes, usable)
    return codes.to(scores.dtype), potentials


@torch.no_grad()
def cross_entropy_over_group(
    group: ProcessGroup,
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () of all rows, the same on all ranks; its gradient by this rank's scores (B, K) and their codes (B, K).

    The gradient is ``w_i (p - q) / (tau W)`` times the number of ranks, W over all ranks. Its average over the ranks is
    that of one process.
    """
    x, weights, usable = usable_rows(scores, marginals, weights, isolate)
    codes, _ = balance_logits(x, normalised(marginals, x), weights, epsilon, num_iters, tol, group)
    loss, gradient = cross_entropy_of_rows(x, codes, temperature)
    weights = torch.ones_like(loss) if weights is None else weights.to(loss)
    counted = weights > 0
    loss, total = sum_(torch.stack([torch.where(counted, weights * loss, 0.0).sum(), weights.sum()]), group)
    total = torch.where(total > 0, total, 1.0)
    gradient = torch.where(counted[:, None], (size(group) * weights / total)[:, None] * gradient, 0.0)
    codes = isolated(codes, usable)
    return loss / total, gradient.to(scores.dtype), codes.to(scores.dtype)
