"""Past latents, for small batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import check_positive_int
from ._distributed import Group, Ranks, size, sum_
from ._state import Record
from .kernels.snapshot import snapshot

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LatentQueue(Record):
    """The last ``size`` latents of training, oldest overwritten first; slots not yet filled are marked so.

    Hand it to the layer as ``queue=``. It keeps latents, not assignments: prototypes move, so each step assigns the
    past anew. No shape depends on the data, so it can be compiled. A process group has one queue: the ranks enqueue
    one after another, and all hold the same. That takes one sum of (size, D + 1) numbers a step.

    Args:
        size: Q, number of slots.
        latent_dim: D.
        group: the processes that share the queue: ``"default"``, None or a ProcessGroup.

    Attributes:
        latents: (Q, D) float32.
        filled: () int64 number of slots in use, those with the lowest index.
        position: () int64 slot of the next latent.
    """

    latents: Tensor
    filled: Tensor
    position: Tensor

    def __init__(self, size: int, latent_dim: int, *, group: Group = "default") -> None:
        super().__init__()
        self.ranks = Ranks(group)
        self.size = check_positive_int("size", size)
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.register_buffer("latents", torch.zeros(size, latent_dim, dtype=torch.float32))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @property
    def in_use(self) -> Tensor:
        """(Q,) bool: which slots hold a latent."""
        return torch.arange(self.size, device=self.filled.device) < snapshot(self.filled)

    def part(self, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """The latents (q, D) that this process adds to a batch of ``group``, and which of them are in use, (q,) bool.

        Each latent belongs to one process. Without a group these are all slots.
        """
        if group is None:
            return snapshot(self.latents), self.in_use
        first, step = dist.get_rank(group), dist.get_world_size(group)
        return snapshot(self.latents)[first::step], self.in_use[first::step]

    def append_past(
        self, scores: Tensor, mask: Tensor | None, group: ProcessGroup | None, head: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``scores`` (N, K) and below them the scores of this process's past latents; beside them which rows count.

        ``mask``: (N,) bool, which rows of ``scores`` count; None for all. Of the slots those in use count. ``head``
        gives the scores of latents. The past carries no gradient.
        """
        latents, in_use = self.part(group)
        with torch.no_grad():
            past = head(latents.to(scores.dtype))
        mask = in_use.new_ones(scores.shape[0]) if mask is None else mask
        return torch.cat([scores, past]), torch.cat([mask, in_use])

    @torch.no_grad()
    def push(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Enqueue the finite rows of ``tokens`` (N, D) where ``mask`` (N,) bool is True, in their order.

        Of more than Q rows the last Q remain.
        """
        group = self.ranks.active()
        usable = tokens.isfinite().all(1)
        usable = usable if mask is None else usable & mask
        if tokens.shape[0] == 0:  # a rank without latents must take part in the sums
            tokens, usable = tokens.new_zeros(1, tokens.shape[1]), usable.new_zeros(1)
        number = usable.cumsum(0)  # of each usable row, from 1
        before, total = _rows_before(number[-1], group)
        # The last `kept` of all new rows stay. Slot j takes new row number `row`, or none.
        kept = total.clamp(max=self.size)
        offset = (torch.arange(self.size, device=total.device) - self.position) % self.size
        row = offset + (total - kept) - before
        fresh = (offset < kept) & (row >= 0) & (row < number[-1])
        source = torch.searchsorted(number, row + 1).clamp(max=tokens.shape[0] - 1)
        rows = torch.where(fresh[:, None], tokens[source].to(self.latents.dtype), 0.0)
        if group is not None:
            both = sum_(torch.cat([rows, fresh[:, None].to(rows.dtype)], 1), group)
            rows, fresh = both[:, :-1], both[:, -1] > 0
        self.latents.copy_(torch.where(fresh[:, None], rows, self.latents))
        self.position.copy_((self.position + kept) % self.size)
        self.filled.copy_((self.filled + kept).clamp(max=self.size))

    def extra_repr(self) -> str:
        return f"{self.size}, {self.latents.shape[1]}"


def _rows_before(count: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The numbers of rows before this rank's and of all ranks, () int64 each. ``count``: this rank's rows."""
    if group is None:
        return torch.zeros_like(count), count
    rank = dist.get_rank(group)
    counts = torch.zeros(size(group), dtype=torch.int64, device=count.device)
    counts[rank] = count
    counts = sum_(counts, group)
    return counts[:rank].sum(), counts.sum()
