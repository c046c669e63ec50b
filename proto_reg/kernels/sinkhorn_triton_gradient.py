"""Gradients through Sinkhorn's iterations in Triton, behind ``proto_reg::sinkhorn_gradient``. See sinkhorn_triton.py.

The forward kernels run again and keep ``h`` of each iteration. Then the iterations are gone through backwards, by the
formulas in ``sinkhorn_gradient.py``, whose names these kernels use. A small matrix and its gradient stay on the chip.
A larger one is streamed: for each iteration a pass over blocks of rows, and a kernel that adds the blocks' sums.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from .sinkhorn_gradient import sinkhorn_gradient_reference
from .sinkhorn_triton import OPTIONS, Problem, finite, stream, suits, tile, warps
from .sinkhorn_triton_tile import (
    balanced_scores,
    column_sums,
    load_scores,
    load_shares,
    load_weights,
    plan_rows,
    solve_on_chip,
    sum_partials,
)

WARPS = 16  # of a program that streams, with 4 entries of its tile to a thread, or 8 in the widest


def tile_back(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile, streamed: half of :func:`tile`, as a program holds the gradient, too."""
    BR, BK = tile(columns)
    return max(1, BR // 2), BK


@triton.jit
def _back_codes(p, by_codes, rows, columns, B, K):
    """The gradient by S / eps of a tile, through each row's softmax alone; 0 beyond the matrix."""
    inside = (rows[:, None] < B) & (columns[None, :] < K)
    given = tl.load(by_codes + rows[:, None] * K + columns[None, :], mask=inside, other=0.0)
    mean = tl.sum(p * given, 1)
    return tl.where((rows < B)[:, None] & (p != 0.0), p * (given - mean[:, None]), 0.0)


@triton.jit
def _first_a(sums, by_potentials, h, columns, K, total, POTENTIALS: tl.constexpr):
    """The gradient by the last potentials, from the column sums of that through the codes."""
    a = sums
    if POTENTIALS:
        given = tl.load(by_potentials + columns, mask=columns < K, other=0.0)
        a += tl.where(h == float("inf"), 0.0, given)
    return tl.where(total > 0.0, a, 0.0)


@triton.jit
def _back_iteration(p, w, a, sums, mean):
    """What an iteration adds to the gradient by S / eps; h of each row; the rows' part of a before the iteration."""
    gone = sums == 0.0
    b = tl.where(gone, 0.0, a / tl.where(gone, 1.0, sums) - mean)
    h = tl.sum(p * b[None, :], 1)
    counts = w[:, None] > 0.0
    added = tl.where(counts, w[:, None] * p * (h[:, None] - b[None, :]), 0.0)
    return added, h, tl.sum(tl.where(counts, (w * (h + mean))[:, None] * p, 0.0), 0)


@triton.jit
def _back_start(s, w, top, h, target, a, scale):
    """What the first iteration takes from the gradient by S / eps, for rows of weight 1."""
    alive = (h < float("inf")) & (target > 0.0)
    y = tl.where(alive, a / tl.where(alive, target, 1.0), 0.0)
    e = tl.exp2((s - top[None, :]) * scale - h[None, :])
    return tl.where(w[:, None] > 0.0, e * y[None, :], 0.0)


@triton.jit
def _one_back(
    scores, marginals, weights, by_codes, by_potentials, by_scores, by_shares, by_weights, history,
    B, K, share_step, passes, scale, inverse, tol,
    MARGINALS: tl.constexpr, WEIGHTS: tl.constexpr, TOL: tl.constexpr, POTENTIALS: tl.constexpr,
    BB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One problem, on the chip from the first read to the last write, but for the ``history`` (G, passes, K)."""
    group = tl.program_id(0).to(tl.int64)
    rows, columns, first = tl.arange(0, BB), tl.arange(0, BK), group * B * K
    history += group * passes * K
    s, w, share, total, top, start, h, moves = solve_on_chip(
        scores + first, marginals + group * share_step, weights + group * B, history, rows, columns, B, K, passes,
        scale, tol, MARGINALS, WEIGHTS, False, TOL, True,
    )  # fmt: skip
    tl.debug_barrier()  # other threads read the history than wrote it
    by_x = _back_codes(plan_rows(s, top, h, scale), by_codes + first, rows, columns, B, K)
    a = _first_a(tl.sum(by_x, 0), by_potentials + group * K, h, columns, K, total, POTENTIALS)
    mean = tl.sum(a, 0) / tl.where(total > 0.0, total, 1.0)
    by_share, by_row = a, tl.zeros((BB,), tl.float32)
    for step in range(moves):
        h = tl.load(history + (moves - 1 - step) * K + columns, mask=columns < K, other=float("inf"))
        p = plan_rows(s, top, h, scale)
        added, gained, a = _back_iteration(p, w, a, column_sums(p, w), mean)
        by_x += added
        by_row -= gained
        by_share += a
    taken = _back_start(s, w, top, start, share * total, a, scale)
    by_x = (by_x - w[:, None] * taken) * inverse
    inside = (rows[:, None] < B) & (columns[None, :] < K)
    tl.store(by_scores + first + rows[:, None] * K + columns[None, :], by_x, mask=inside)
    tl.store(by_shares + group * K + columns, by_share, mask=columns < K)
    if WEIGHTS:
        by_row = tl.where(w > 0.0, by_row - tl.sum(taken, 1), 0.0)
        tl.store(by_weights + group * B + rows, by_row, mask=rows < B)


@triton.jit
def _pass_back(
    scores, marginals, weights, by_codes, by_scores, by_weights, a, partials, state, after,
    B, K, share_step, block, scale, inverse,
    MARGINALS: tl.constexpr, WEIGHTS: tl.constexpr, CODES: tl.constexpr, START: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """For each block of rows: through the codes, through one iteration or through the first one.

    ``state`` is that before the iteration, ``after`` that after it; both lie in the state's order, see _sum_start.
    """
    part, group, parts = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    rows, columns = tl.arange(0, BR), tl.arange(0, BK)
    state, after = state + group * (3 * K + 2), after + group * (3 * K + 2)
    stays = 0.0 if CODES or START else tl.load(after + 3 * K + 1)
    if stays != 0.0:
        return
    share = load_shares(marginals + group * share_step, columns, K, MARGINALS)
    h = tl.load(state + columns, mask=columns < K, other=float("inf"))
    top = tl.load(state + K + columns, mask=columns < K, other=0.0)
    total, sums = tl.load(state + 3 * K), tl.load(after + 2 * K + columns, mask=columns < K, other=0.0)
    slope = tl.load(a + group * K + columns, mask=columns < K, other=0.0)
    mean, moved = tl.sum(slope, 0) / tl.where(total > 0.0, total, 1.0), tl.zeros((BK,), tl.float32)
    for at in range(part * block, part * block + block, BR):
        left, row = B - at, group * B + at  # places in a tile are small numbers
        first = row * K
        s = load_scores(scores + first, rows, columns, left, K)
        w = load_weights(weights + row, s, share, rows, left, WEIGHTS, False)
        alive = tl.where(h == float("inf"), 0.0, 1.0)  # a share would take more registers
        s = balanced_scores(s, alive, MARGINALS)
        place = by_scores + first + rows[:, None] * K + columns[None, :]
        inside = (rows[:, None] < left) & (columns[None, :] < K)
        if CODES:
            by_x = _back_codes(plan_rows(s, top, h, scale), by_codes + first, rows, columns, left, K)
            moved += tl.sum(by_x, 0)
        elif START:
            taken = _back_start(s, w, top, h, share * total, slope, scale)
            gained = tl.sum(taken, 1)
            by_x = (tl.load(place, mask=inside, other=0.0) - w[:, None] * taken) * inverse
        else:
            added, gained, more = _back_iteration(plan_rows(s, top, h, scale), w, slope, sums, mean)
            by_x = tl.load(place, mask=inside, other=0.0) + added
            moved += more
        tl.store(place, by_x, mask=inside)
        if WEIGHTS and not CODES:
            by_row = tl.load(by_weights + row + rows, mask=rows < left, other=0.0)
            tl.store(by_weights + row + rows, tl.where(w > 0.0, by_row - gained, 0.0), mask=rows < left)
    if not START:
        tl.store(partials + (group * parts + part) * K + columns, moved, mask=columns < K)


@triton.jit
def _sum_back(
    by_potentials, partials, a, by_shares, state, K, parts,
    CODES: tl.constexpr, POTENTIALS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """a of BC columns before the iteration whose result is ``state``, and its sum over the iterations."""
    columns, group = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1).to(tl.int64)
    state += group * (3 * K + 2)
    stays = 0.0 if CODES else tl.load(state + 3 * K + 1)
    if stays != 0.0:
        return
    sums, place = sum_partials(partials + group * parts * K, columns, K, parts, BP, BC), group * K + columns
    if CODES:
        h, total = tl.load(state + columns, mask=columns < K, other=float("inf")), tl.load(state + 3 * K)
        sums = _first_a(sums, by_potentials + group * K, h, columns, K, total, POTENTIALS)
        tl.store(by_shares + place, sums, mask=columns < K)
    else:
        tl.store(by_shares + place, tl.load(by_shares + place, mask=columns < K) + sums, mask=columns < K)
    tl.store(a + place, sums, mask=columns < K)


def sinkhorn_gradient(
    scores: Tensor, marginals: Tensor | None, weights: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sinkhorn_gradient_reference` by these kernels."""
    if scores.dtype != torch.float32 or not suits(scores):
        return sinkhorn_gradient_reference(scores, marginals, weights, *rest)
    epsilon, num_iters, tol, by_codes, by_potentials = rest
    p = Problem(scores, marginals, weights, epsilon)
    by_scores, by_shares = torch.empty_like(p.scores), torch.empty_like(p.potentials)
    by_weights = scores.new_empty(0) if weights is None else torch.zeros_like(p.weights)
    # A pointer that no kernel reads stands for what is not given.
    given = (by_codes.contiguous(), by_shares if by_potentials is None else by_potentials.contiguous())
    tensors = (*given, by_scores, by_shares, by_scores if weights is None else by_weights)
    flags, last = {**p.given, "WEIGHTS": weights is not None}, {"POTENTIALS": by_potentials is not None}
    if p.fits(2):  # the matrix and its gradient
        history, (BB, BK) = by_shares.new_empty(by_shares.numel() * (num_iters - 1)), p.padded
        _one_back[(p.groups,)](
            p.scores, p.marginals, p.weights, *tensors, history, *p.shape, num_iters - 1, p.scale, finite(1 / epsilon),
            0.0 if tol is None else tol, **flags, **last, TOL=tol is not None, BB=BB, BK=BK, num_warps=warps(BB * BK),
            **OPTIONS,
        )  # fmt: skip
    else:
        _stream_back(p, flags, last, num_iters, tol, finite(1 / epsilon), *tensors)
    if marginals is None:
        return by_scores, scores.new_empty(0), by_weights
    positive = marginals > 0
    return by_scores, torch.where(positive, by_shares / torch.where(positive, marginals, 1.0), 0.0), by_weights


def _stream_back(
    p: Problem,
    flags: dict[str, bool],
    last: dict[str, bool],
    num_iters: int,
    tol: float | None,
    inverse: float,
    *tensors: Tensor,
) -> None:
    """Launch what leads to the gradients of a large matrix: 2 kernels an iteration, after those of the forward pass."""
    by_codes, by_potentials, by_scores, by_shares, by_weights = tensors
    states: list[Tensor] = []
    state, totals = p.potentials.new_empty(p.groups * (3 * p.columns + 2)), p.potentials.new_empty(p.groups * p.parts)
    stream(p, {**flags, "ISOLATE": False}, num_iters, tol, state, totals, states)
    a, partials = torch.empty_like(by_shares), by_shares.new_empty(by_shares.numel() * p.parts)
    BR, BK = tile_back(p.columns)

    def go_back(before: Tensor, after: Tensor, *, codes: bool = False, start: bool = False) -> None:
        _pass_back[(p.parts, p.groups)](
            p.scores, p.marginals, p.weights, by_codes, by_scores, by_weights, a, partials, before, after, *p.shape,
            p.block, p.scale, inverse, **flags, CODES=codes, START=start, BR=BR, BK=BK, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
        if not start:
            _sum_back[triton.cdiv(p.columns, 32), p.groups](
                by_potentials, partials, a, by_shares, after, p.columns, p.parts, CODES=codes, **last, BP=64, BC=32,
                num_warps=4, **OPTIONS,
            )  # fmt: skip

    go_back(state, state, codes=True)
    for after, before in itertools.pairwise(reversed(states)):
        go_back(before, after)
    go_back(states[0], states[0], start=True)


OPERATORS: dict[str, Any] = {"sinkhorn_gradient": sinkhorn_gradient}
