"""Sums of a kernel over the pairs of points of a group, with their gradients: one masked matrix, or tiles by group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from . import closed_forms

# Up to this many points one masked matrix is cheapest, and its shapes do not depend on the data. On a device the
# limit is higher, because tiles by group cost one host read there.
DENSE_LIMIT = {"cpu": 256}
DENSE_LIMIT_DEVICE = 4096
# Elements of a kernel matrix in memory at once.
SLAB = 1 << 20


def pair_sums(
    x: Tensor, weight: Tensor, slot: Tensor, num_groups: int, kernel: str, scales: list[float]
) -> tuple[Tensor, Tensor]:
    """sum_{i != j} w_i w_j k_ij by group (K,), and its gradient (N, D). ``slot`` == num_groups leaves a row out."""
    weight = torch.where(slot < num_groups, weight, 0.0)
    count = sum_by_group(weight.abs(), slot, num_groups).clamp_min(1)
    # Distances do not need a group's mean. Far from the anchor it would swamp differences in float32.
    mean = x.new_zeros(num_groups + 1, x.shape[1]).index_add_(0, slot, x * weight.abs()[:, None])[:-1] / count[:, None]
    x = x - per_row(mean, slot)
    dense_limit = DENSE_LIMIT.get(x.device.type, DENSE_LIMIT_DEVICE)
    form = _dense_groups if len(x) <= dense_limit else _tiled_groups
    row_sums, gradient = form(x, weight, slot, num_groups, kernel, scales)
    return sum_by_group(weight * row_sums, slot, num_groups), gradient


def _dense_groups(
    x: Tensor, weight: Tensor, slot: Tensor, num_groups: int, kernel: str, scales: list[float]
) -> tuple[Tensor, Tensor]:
    """Row sums (N,) and gradient (N, D) from one masked N x N matrix."""
    pair = (slot[:, None] == slot[None, :]) & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    k, slope = closed_forms.pair(kernel, _squared_distances(x, x), x.shape[1], scales)
    k, slope = torch.where(pair, k, 0.0) * weight, torch.where(pair, slope, 0.0) * weight
    return k.sum(1), 4 * weight[:, None] * (slope.sum(1, keepdim=True) * x - slope @ x)


def weighted_pair_sums(x: Tensor, p: Tensor, kernel: str, scales: list[float]) -> tuple[Tensor, Tensor]:
    """sum_k sum_{i != j} p_ik p_jk k_ij and its gradient (N, D), in slabs of rows."""
    gradient, row_sums = torch.empty_like(x), torch.empty_like(x[:, 0])
    rows = max(1, SLAB // len(x))
    for start in range(0, len(x), rows):
        block = slice(start, start + rows)
        weight = p[block] @ p.T
        weight.diagonal(start).zero_()
        k, slope = closed_forms.pair(kernel, _squared_distances(x[block], x), x.shape[1], scales)
        row_sums[block] = (k * weight).sum(1)
        slope *= weight
        gradient[block] = 4 * (slope.sum(1, keepdim=True) * x[block] - slope @ x)
    return row_sums.sum(), gradient


def _tiled_groups(
    x: Tensor, weight: Tensor, slot: Tensor, num_groups: int, kernel: str, scales: list[float]
) -> tuple[Tensor, Tensor]:
    """Row sums (N,) and gradient (N, D) from C x C tiles: rows sorted by group, groups cut into chunks of C.

    It computes only tiles on or above a group's diagonal, in slabs of bounded size. Time: O(sum_k n_k^2 / 2 + N C).
    Memory: O(N D + SLAB).
    """
    dim = x.shape[1]
    chunk = _chunk_size(len(x), num_groups)
    position, chunk_group = _chunk_rows(slot, num_groups, chunk)
    # One spare row takes every row that is left out. Padding has weight 0, so it adds nothing.
    size = len(chunk_group) * chunk
    tiles = rearrange(x.new_zeros(size + 1, dim).index_copy_(0, position, x)[:-1], "(m c) d -> m c d", c=chunk)
    weights = rearrange(x.new_zeros(size + 1).index_copy_(0, position, weight)[:-1], "(m c) -> m c", c=chunk)
    norms = tiles.square().sum(2)
    row_sums, gradient = torch.zeros_like(weights), torch.zeros_like(tiles)

    for a, b, mirrored in _tile_pairs(chunk_group, max(1, SLAB // chunk**2)):
        xa, xb, wa, wb = tiles[a], tiles[b], weights[a], weights[b]
        squared = torch.baddbmm(norms[a][:, :, None] + norms[b][:, None, :], xa, xb.mT, alpha=-2).clamp_min_(0)
        k, slope = closed_forms.pair(kernel, squared, dim, scales)
        if not mirrored:
            k.diagonal(dim1=1, dim2=2).zero_()
            slope.diagonal(dim1=1, dim2=2).zero_()
        _accumulate(row_sums, gradient, a, k, slope, wb, xa, xb)
        if mirrored:
            _accumulate(row_sums, gradient, b, k.mT, slope.mT, wa, xb, xa)

    gradient *= 4 * weights[:, :, None]
    flat = torch.cat([rearrange(gradient, "m c d -> (m c) d"), gradient.new_zeros(1, dim)])
    sums = torch.cat([rearrange(row_sums, "m c -> (m c)"), row_sums.new_zeros(1)])
    return sums[position], flat[position]


def _accumulate(
    row_sums: Tensor, gradient: Tensor, a: Tensor, k: Tensor, slope: Tensor, wb: Tensor, xa: Tensor, xb: Tensor
) -> None:
    """Add to the rows of chunks ``a`` the terms of chunks b with weights ``wb``."""
    row_sums.index_add_(0, a, (k @ wb[:, :, None])[:, :, 0])
    gradient.index_add_(0, a, (slope @ wb[:, :, None]) * xa - slope @ (wb[:, :, None] * xb))


def _chunk_size(rows: int, num_groups: int) -> int:
    """Rows of a tile: about a group's size, within the limits of efficient batched products."""
    return min(128, max(16, 1 << (max(1, rows // num_groups) - 1).bit_length()))


def _chunk_rows(slot: Tensor, num_groups: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The place of each row in the padded chunks (N,), and the group of each chunk (M,).

    Rows that are left out have the last place + 1. The number of chunks depends on the data: on a device this is the
    reference's only host read.
    """
    order = slot.argsort(stable=True)
    counts = slot.new_zeros(num_groups + 1).scatter_add_(0, slot, torch.ones_like(slot))
    chunks = (counts[:-1] + chunk - 1) // chunk
    chunk_group = torch.repeat_interleave(torch.arange(num_groups, device=slot.device), chunks)
    first_row, first_chunk = counts.cumsum(0) - counts, chunks.cumsum(0) - chunks
    sorted_slot = slot[order]
    rank = torch.arange(len(slot), device=slot.device) - first_row[sorted_slot]
    place = per_row(first_chunk, sorted_slot) * chunk + rank
    left_out = len(chunk_group) * chunk
    place = torch.where(sorted_slot < num_groups, place, left_out)
    return torch.empty_like(place).scatter_(0, order, place), chunk_group


def _tile_pairs(chunk_group: Tensor, slab: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Index pairs (a, b) of chunks of one group with b >= a, at most ``slab`` at once, and whether b > a."""
    index = torch.arange(len(chunk_group), device=chunk_group.device)
    for a in index.split(slab):
        yield a, a, False
    last = torch.searchsorted(chunk_group, chunk_group, right=True) - 1
    after = last - index
    a = torch.repeat_interleave(index, after)
    start = torch.repeat_interleave(after.cumsum(0) - after, after)
    b = a + 1 + torch.arange(len(a), device=a.device) - start
    for some_a, some_b in zip(a.split(slab), b.split(slab), strict=True):
        if len(some_a):
            yield some_a, some_b, True


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum(1)[:, None] + y.square().sum(1)[None, :]
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_min_(0)


def sum_by_group(values: Tensor, slot: Tensor, num_groups: int) -> Tensor:
    """(K,) sums of ``values`` (N,) by group; ``slot`` == num_groups leaves a row out."""
    return values.new_zeros(num_groups + 1).index_add_(0, slot, values)[:-1]


def per_row(by_group: Tensor, slot: Tensor) -> Tensor:
    """The entry of each row's group; 0 for rows that are left out."""
    return torch.cat([by_group, torch.zeros_like(by_group[:1])])[slot]
