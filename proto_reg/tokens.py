"""The tokens of a batch that several processes share, and which of them enter the MMD."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._distributed import gather_rows, row_counts, rows_before
from ._random import mix

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Share(NamedTuple):
    """This process's share of the batch: rows ``start`` to ``start`` + N of the ``total`` of the group.

    ``counts``: N of every rank; ``masked``: whether any of them leaves rows out.
    """

    group: ProcessGroup | None
    start: int
    total: int
    counts: tuple[int, ...]
    masked: bool


def share_of(tokens: Tensor, masked: bool, group: ProcessGroup | None) -> Share:
    """The share that ``tokens`` (N, D) are. ValueError if no process of the group has any."""
    count = tokens.shape[0]
    if group is None:
        return Share(None, 0, count, (count,), masked)
    entries = row_counts(2 * count + masked, group, tokens.device)
    counts = tuple(entry // 2 for entry in entries)
    if sum(counts) == 0:
        raise ValueError("z: expected latents in one process of the group at least, got none. Skip empty batches.")
    return Share(group, rows_before(counts, group), sum(counts), counts, any(entry % 2 for entry in entries))


def gather(tokens: Tensor, keep: Tensor | None, share: Share) -> tuple[Tensor, Tensor | None, Share]:
    """Tokens of all ranks (total, D), which of them count, and the share that they are of a batch of their own."""
    rows = tokens
    if share.masked:
        counted = tokens.new_ones(len(tokens), 1) if keep is None else keep[:, None].to(tokens)
        rows = torch.cat([tokens, counted], 1)
    rows, _ = gather_rows(rows.contiguous(), share.group, share.counts)
    whole = Share(None, 0, share.total, (share.total,), share.masked)
    if not share.masked:
        return rows, None, whole
    return rows[:, :-1].contiguous(), rows[:, -1] > 0, whole


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
