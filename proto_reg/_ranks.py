"""The process group, if there is one: sums over its ranks, and what rank 0 says."""

from __future__ import annotations

import torch
from torch import Tensor


def distributed() -> bool:
    """Whether there is a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_ranks(value: Tensor) -> Tensor:
    """``value`` summed in place over all ranks, equal on all of them."""
    if distributed():
        torch.distributed.all_reduce(value)
    return value


def from_first_rank(value: Tensor) -> Tensor:
    """``value`` overwritten in place by that of rank 0."""
    if distributed():
        torch.distributed.broadcast(value, 0)
    return value


def any_rank(failed: bool, device: torch.device) -> bool:
    """Whether any rank failed: what one cannot do alone, all must refuse together, or the others wait for ever."""
    if not distributed():
        return failed
    return bool(sum_over_ranks(torch.tensor(float(failed), device=device)))
