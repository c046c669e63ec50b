"""The tokens of a batch that several processes share, and which of them enter the MMD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._distributed import gather_equal, gather_rows, row_counts, rows_before, size
from ._random import mix

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Share(NamedTuple):
    """This process's share of the batch: rows ``start`` to ``start`` + N of the ``total`` of the group.

    ``counts``: N of every rank; ``masked``: whether any of them leaves rows out; ``whole``: tokens of all ranks
    (total, D), and which of them count or None for all, where they were gathered.
    """

    group: ProcessGroup | None
    start: int
    total: int
    counts: tuple[int, ...]
    masked: bool
    whole: tuple[Tensor, Tensor | None] | None = None


def undivided(tokens: Tensor, keep: Tensor | None) -> Share:
    """The share that ``tokens`` (N, D) are of a batch of their own."""
    count = tokens.shape[0]
    return Share(None, 0, count, (count,), keep is not None)


class Gatherer:
    """Counts the tokens of all processes, and gathers them while they are few, on the CPU by one exchange a step.

    Each process sends its count and as many rows as the largest share had so far; where a share is larger, which all
    learn from the counts, all send once more. So ``capacity`` is equal on all of them. What is gathered does not depend
    on it: it is no state, and copies start anew.
    """

    def __init__(self) -> None:
        self.group: ProcessGroup | None = None
        self.capacity = 0

    def __getstate__(self) -> dict:
        return {"group": None, "capacity": 0}

    def share_of(self, tokens: Tensor, keep: Tensor | None, group: ProcessGroup, most: int) -> Share:
        """The share that ``tokens`` (N, D) are, gathered if there are at most ``most`` in all.

        ``keep`` (N,) bool says which count, None all; a process may leave rows out where another does not.

        Raises:
            ValueError: no process of the group has any.
        """
        if not tokens.is_cpu:  # a count among the rows would have to be waited for
            return _by_two_exchanges(tokens, keep, group, most)
        known = self.capacity if self.group is group else 0
        capacity = known if known * size(group) <= most else 0
        share, blocks = _exchange(tokens, keep, group, capacity)
        if share.total > most:
            return share
        longest = max(share.counts)
        if longest > capacity:
            capacity = longest
            share, blocks = _exchange(tokens, keep, group, capacity)
        self.group, self.capacity = group, max(capacity, known)
        width = tokens.shape[1] + 1
        rows = [
            block[: capacity * width].view(capacity, width)[:count]
            for block, count in zip(blocks, share.counts, strict=True)
        ]
        return share._replace(whole=_split(torch.cat(rows), share.masked))


def _exchange(
    tokens: Tensor, keep: Tensor | None, group: ProcessGroup, capacity: int
) -> tuple[Share, tuple[Tensor, ...]]:
    """The share that ``tokens`` are, and of each rank its first ``capacity`` rows with their flags, flat.

    Every block begins with the count, as the bits of an int64.
    """
    count, width = tokens.shape[0], tokens.shape[1] + 1
    head = torch.tensor([2 * count + (keep is not None)], dtype=torch.int64, device=tokens.device).view(tokens.dtype)
    sent = min(count, capacity)
    rows = _with_flags(tokens[:sent], None if keep is None else keep[:sent]).flatten()
    block = torch.cat([head, rows, rows.new_zeros((capacity - sent) * width)])
    blocks = gather_equal(block, group)
    entries = blocks[:, : len(head)].contiguous().view(torch.int64).flatten().tolist()
    return _share(entries, group), blocks[:, len(head) :].unbind()


def _by_two_exchanges(tokens: Tensor, keep: Tensor | None, group: ProcessGroup, most: int) -> Share:
    """:meth:`Gatherer.share_of` with counts that go past the device where the group can."""
    share = _share(row_counts(2 * tokens.shape[0] + (keep is not None), group, tokens.device), group)
    if share.total > most:
        return share
    rows = _with_flags(tokens, keep) if share.masked else tokens
    rows, _ = gather_rows(rows.contiguous(), group, share.counts)
    return share._replace(whole=_split(rows, True) if share.masked else (rows, None))


def _share(entries: Sequence[int], group: ProcessGroup) -> Share:
    """From each rank's 2 N + (whether it leaves rows out)."""
    counts = tuple(entry // 2 for entry in entries)
    if sum(counts) == 0:
        raise ValueError("z: expected latents in one process of the group at least, got none. Skip empty batches.")
    return Share(group, rows_before(counts, group), sum(counts), counts, any(entry % 2 for entry in entries))


def _with_flags(tokens: Tensor, keep: Tensor | None) -> Tensor:
    """Tokens (N, D) with a last column: 1 for those that count, 0 for the others."""
    counted = tokens.new_ones(tokens.shape[0], 1) if keep is None else keep[:, None].to(tokens)
    return torch.cat([tokens, counted], 1)


def _split(rows: Tensor, masked: bool) -> tuple[Tensor, Tensor | None]:
    """The reverse; no flags unless ``masked``."""
    return rows[:, :-1].contiguous(), rows[:, -1] > 0 if masked else None


def subsample(
    count: int, keep: Tensor | None, share: Share, limit: int, step: Tensor, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Choose ``limit`` of the group's tokens: those of lowest key, a function of seed, step and place in the batch.

    Args:
        count: N, this process's tokens; ``keep`` (N,) bool says which count, None all.
        step: () int64.

    Returns:
        Indices (n,) of this process's tokens that may be among them, and which are; None for all of these.
    """
    place = torch.arange(share.start, share.start + count, device=step.device)
    key = mix(place + step * 1_000_003 + seed % 2**31 * 0x5851F42D)
    if keep is not None:
        key = torch.where(keep, key, torch.iinfo(torch.int64).max)
    lowest, index = key.topk(min(count, limit), largest=False)
    chosen = None if keep is None else keep[index]
    if share.group is None:
        return index, chosen
    highest = gather_rows(lowest, share.group)[0].kthvalue(limit).values
    return index, lowest <= highest if chosen is None else chosen & (lowest <= highest)
