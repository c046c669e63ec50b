"""A batch as rows, each process's shard of it, and the rows that enter the MMD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from ._distributed import gather_equal, gather_rows, row_counts, rows_before, size
from ._random import mix

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class BatchShard(NamedTuple):
    """This process's shard of a batch: rows ``start`` to ``start`` + N of the ``total`` rows of its group.

    ``tokens``: (N, D) latents. ``mask``: (N,) bool, True where a row counts; None if all count. ``counts``: N of
    every process. ``whole``: the rows of all processes as one batch, if they were gathered.
    """

    tokens: Tensor
    mask: Tensor | None
    group: ProcessGroup | None
    start: int
    total: int
    counts: tuple[int, ...]
    whole: BatchShard | None = None

    @classmethod
    def undivided(cls, tokens: Tensor, mask: Tensor | None) -> Self:
        """A batch of one process."""
        count = tokens.shape[0]
        return cls(tokens, mask, None, 0, count, (count,))

    @classmethod
    def of_group(cls, tokens: Tensor, mask: Tensor | None, group: ProcessGroup, counts: Sequence[int]) -> Self:
        """This process's shard of the batch of ``group``, whose processes hold ``counts`` rows.

        Raises:
            ValueError: no process has a row.
        """
        if sum(counts) == 0:
            raise ValueError("z: expected latents in one process of the group at least, got none. Skip empty batches.")
        return cls(tokens, mask, group, rows_before(counts, group), sum(counts), tuple(counts))

    def with_whole(self, tokens: Tensor, mask: Tensor | None) -> Self:
        """The same shard, with the rows of all processes, (total, D) and (total,) or None."""
        return self._replace(whole=BatchShard.undivided(tokens, mask))


class Gatherer:
    """Counts the rows of all processes. Gathers them while they are few: on the CPU with one exchange a step.

    Each process sends its count, and as many rows as the largest shard had so far. All processes learn the counts. If
    one shard is larger, all send once more. So ``capacity`` is equal on all of them. The result does not depend on it:
    it is no state, and copies start anew.
    """

    def __init__(self) -> None:
        self.group: ProcessGroup | None = None
        self.capacity = 0

    def __getstate__(self) -> dict:
        return {"group": None, "capacity": 0}

    def shard(self, tokens: Tensor, mask: Tensor | None, group: ProcessGroup, gather_limit: int) -> BatchShard:
        """The shard of this process. Its ``whole`` is there if all processes have at most ``gather_limit`` rows.

        ``tokens`` (N, D), ``mask`` (N,) bool or None. One process may have a mask where another has none.

        Raises:
            ValueError: no process has a row.
        """
        if not tokens.is_cpu:  # the host would wait for a count that travels among the rows
            return _by_two_exchanges(tokens, mask, group, gather_limit)
        known = self.capacity if self.group is group else 0
        capacity = known if known * size(group) <= gather_limit else 0
        shard, masked, blocks = _exchange(tokens, mask, group, capacity)
        if shard.total > gather_limit:
            return shard
        longest = max(shard.counts)
        if longest > capacity:
            capacity = longest
            shard, masked, blocks = _exchange(tokens, mask, group, capacity)
        self.group, self.capacity = group, max(capacity, known)
        width = tokens.shape[1] + 1
        rows = [
            block[: capacity * width].view(capacity, width)[:count]
            for block, count in zip(blocks, shard.counts, strict=True)
        ]
        return shard.with_whole(*_without_flags(torch.cat(rows), masked))


def _exchange(
    tokens: Tensor, mask: Tensor | None, group: ProcessGroup, capacity: int
) -> tuple[BatchShard, bool, tuple[Tensor, ...]]:
    """The shard; whether any process has a mask; of each process its first ``capacity`` rows with flags, flat.

    Every block begins with the count, as the bits of an int64.
    """
    count, width = tokens.shape[0], tokens.shape[1] + 1
    entry = torch.tensor([_entry(tokens, mask)], dtype=torch.int64, device=tokens.device).view(tokens.dtype)
    sent = min(count, capacity)
    rows = _with_flags(tokens[:sent], None if mask is None else mask[:sent]).flatten()
    block = torch.cat([entry, rows, rows.new_zeros((capacity - sent) * width)])
    blocks = gather_equal(block, group)
    counts, masked = _counts(blocks[:, : len(entry)].contiguous().view(torch.int64).flatten().tolist())
    return BatchShard.of_group(tokens, mask, group, counts), masked, blocks[:, len(entry) :].unbind()


def _by_two_exchanges(tokens: Tensor, mask: Tensor | None, group: ProcessGroup, gather_limit: int) -> BatchShard:
    """:meth:`Gatherer.shard` with a separate exchange for the counts, which passes no device if it can."""
    counts, masked = _counts(row_counts(_entry(tokens, mask), group, tokens.device))
    shard = BatchShard.of_group(tokens, mask, group, counts)
    if shard.total > gather_limit:
        return shard
    rows = _with_flags(tokens, mask) if masked else tokens
    rows, _ = gather_rows(rows.contiguous(), group, shard.counts)
    return shard.with_whole(*(_without_flags(rows, True) if masked else (rows, None)))


def _entry(tokens: Tensor, mask: Tensor | None) -> int:
    """The number of rows, and whether there is a mask, in one number."""
    return 2 * tokens.shape[0] + (mask is not None)


def _counts(entries: Sequence[int]) -> tuple[list[int], bool]:
    """Each process's number of rows, and whether any of them has a mask, from their :func:`_entry`."""
    return [entry // 2 for entry in entries], any(entry % 2 for entry in entries)


def _with_flags(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens (N, D) with the mask as their last column."""
    flags = tokens.new_ones(tokens.shape[0], 1) if mask is None else mask[:, None].to(tokens)
    return torch.cat([tokens, flags], 1)


def _without_flags(rows: Tensor, masked: bool) -> tuple[Tensor, Tensor | None]:
    """The tokens and the mask of :func:`_with_flags`; no mask unless ``masked``."""
    return rows[:, :-1].contiguous(), rows[:, -1] > 0 if masked else None


def subsample(batch: BatchShard, limit: int, step: Tensor, seed: int) -> tuple[Tensor, Tensor | None]:
    """Choose ``limit`` rows of the whole batch: those with the lowest keys.

    A key is a function of ``seed``, ``step`` () int64 and the row's place in the batch.

    Returns:
        index: (n,) int64, rows of this process that may be among them.
        mask: (n,) bool, which of those rows are; None for all of them.
    """
    count, mask = batch.tokens.shape[0], batch.mask
    place = torch.arange(batch.start, batch.start + count, device=step.device)
    key = mix(place + step * 1_000_003 + seed % 2**31 * 0x5851F42D)
    if mask is not None:
        key = torch.where(mask, key, torch.iinfo(torch.int64).max)
    lowest, index = key.topk(min(count, limit), largest=False)
    chosen = None if mask is None else mask[index]
    if batch.group is None:
        return index, chosen
    highest = gather_rows(lowest, batch.group)[0].kthvalue(limit).values
    return index, lowest <= highest if chosen is None else chosen & (lowest <= highest)
