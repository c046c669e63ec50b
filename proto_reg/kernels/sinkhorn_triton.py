"""Sinkhorn in Triton, behind the same operators: for GPUs without our CUDA library. Imported when it is first needed.

Every iteration is one softmax over the rows in the log domain, as in ``sinkhorn_log.balance_logits``. A small
matrix stays on the chip: one program computes one problem. A larger one is streamed: programs sum columns over blocks
of rows, and a second kernel adds the sums. Wider rows, and float64, go to plain torch. sinkhorn_triton_tile.py tells
what the letters mean.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from .sinkhorn import sinkhorn_out_reference
from .sinkhorn_reference import sinkhorn_cross_entropy_reference, sinkhorn_reference
from .sinkhorn_triton_tile import (
    balanced_scores,
    column_masses,
    column_sums,
    column_tops,
    first_h,
    is_settled,
    load_scores,
    load_shares,
    load_weights,
    next_h,
    plan_rows,
    solve_on_chip,
    store_potentials,
    store_rows,
    sum_partials,
)

ON_CHIP = 8192  # entries that one program holds
WIDEST = 4096  # columns of a row that one program holds
TILE = 4096  # entries of a tile of rows, streamed
PROGRAMS = 512  # for one streamed matrix, at most
MOST_LARGE = 65_535  # streamed matrices of a call: a grid's second axis has no more
# Fused multiply-adds are off: triton has changed its default, and a result should not depend on the version.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def _one(
    scores, marginals, weights, codes, potentials, state, B, K, share_step, passes, scale, eighths, tol,
    MARGINALS: tl.constexpr, WEIGHTS: tl.constexpr, ISOLATE: tl.constexpr, TOL: tl.constexpr,
    ENTROPY: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One problem, on the chip from the first read to the last write; with an entropy, as far as the state."""
    group = tl.program_id(0).to(tl.int64)
    rows, columns, first = tl.arange(0, BB), tl.arange(0, BK), group * B * K
    s, w, _, total, top, _, h, _ = solve_on_chip(
        scores + first, marginals + group * share_step, weights + group * B, state, rows, columns, B, K, passes, scale,
        tol, MARGINALS, WEIGHTS, ISOLATE, TOL, False,
    )  # fmt: skip
    if ENTROPY:
        state += group * (3 * K + 2)
        tl.store(state + columns, h, mask=columns < K)
        tl.store(state + K + columns, top, mask=columns < K)
        tl.store(state + 3 * K, total)
    else:
        p = plan_rows(s, top, h, scale)
        store_rows(
            codes + first, codes, s, p, w, rows, columns, B, K, total, 1.0, 1.0, True, False,
        )  # fmt: skip
        store_potentials(potentials + group * K, columns, K, h, top, total, eighths)


@triton.jit
def _start(
    scores, marginals, weights, partials, totals, B, K, share_step, block, scale,
    MARGINALS: tl.constexpr, WEIGHTS: tl.constexpr, ISOLATE: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """For each block of rows and column: the maximum, the sum of exponentials below it; and the block's weight."""
    part, group, parts = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    columns, first = tl.arange(0, BK), group * B * K
    share = load_shares(marginals + group * share_step, columns, K, MARGINALS)
    top, mass, total = tl.full((BK,), -float("inf"), tl.float32), tl.zeros((BK,), tl.float32), 0.0
    for at in range(0, block, BR):
        rows = (part * block + at + tl.arange(0, BR)).to(tl.int64)
        s = load_scores(scores + first, rows, columns, B, K)
        w = load_weights(weights + group * B, s, share, rows, B, WEIGHTS, ISOLATE)
        s, total = balanced_scores(s, share, MARGINALS), total + tl.sum(w, 0)
        new = tl.maximum(top, column_tops(s, w))
        finite = tl.where(new == -float("inf"), 0.0, new)
        mass = mass * tl.exp2((top - finite) * scale) + column_masses(s, w, new, scale)
        top = new
    out = partials + (group * parts + part) * 2 * K
    tl.store(out + columns, top, mask=columns < K)
    tl.store(out + K + columns, mass, mask=columns < K)
    tl.store(totals + group * parts + part, total)


@triton.jit
def _sum_start(
    marginals, partials, totals, state, B, K, share_step, parts, scale,
    MARGINALS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The first h of BC columns from all blocks. ``state`` of a group: h, maxima, sums (K each), total, settled."""
    columns, group = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1).to(tl.int64)
    share = load_shares(marginals + group * share_step, columns, K, MARGINALS)
    top, mass, total = tl.full((BC,), -float("inf"), tl.float32), tl.zeros((BC,), tl.float32), 0.0
    for at in range(0, parts, BP):
        own = at + tl.arange(0, BP)
        total += tl.sum(tl.load(totals + group * parts + own, mask=own < parts, other=0.0), 0)
        inside = (own[:, None] < parts) & (columns[None, :] < K)
        place = partials + (group * parts + own[:, None]) * 2 * K + columns[None, :]
        tops = tl.load(place, mask=inside, other=-float("inf"))
        masses = tl.load(place + K, mask=inside, other=0.0)
        new = tl.maximum(top, tl.max(tops, 0))
        finite = tl.where(new == -float("inf"), 0.0, new)
        mass = mass * tl.exp2((top - finite) * scale)
        mass += tl.sum(tl.where(masses == 0.0, 0.0, masses * tl.exp2((tops - finite[None, :]) * scale)), 0)
        top = new
    state += group * (3 * K + 2)
    tl.store(state + columns, first_h(mass, share, total), mask=columns < K)
    tl.store(state + K + columns, tl.where(top == -float("inf"), 0.0, top), mask=columns < K)
    if tl.program_id(0) == 0:
        tl.store(state + 3 * K, total)
        tl.store(state + 3 * K + 1, tl.where(total > 0.0, 0.0, 1.0))


@triton.jit
def _pass(
    scores, marginals, weights, partials, state, B, K, share_step, block, scale,
    MARGINALS: tl.constexpr, WEIGHTS: tl.constexpr, ISOLATE: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """For each block of rows: the column sums of the plan."""
    part, group, parts = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    columns, first = tl.arange(0, BK), group * B * K
    state += group * (3 * K + 2)
    if tl.load(state + 3 * K + 1) != 0.0:
        return
    share = load_shares(marginals + group * share_step, columns, K, MARGINALS)
    h = tl.load(state + columns, mask=columns < K, other=float("inf"))
    top = tl.load(state + K + columns, mask=columns < K, other=0.0)
    sums = tl.zeros((BK,), tl.float32)
    for at in range(0, block, BR):
        rows = (part * block + at + tl.arange(0, BR)).to(tl.int64)
        s = load_scores(scores + first, rows, columns, B, K)
        w = load_weights(weights + group * B, s, share, rows, B, WEIGHTS, ISOLATE)
        sums += column_sums(plan_rows(balanced_scores(s, share, MARGINALS), top, h, scale), w)
    tl.store(partials + (group * parts + part) * K + columns, sums, mask=columns < K)


@triton.jit
def _sum_pass(
    marginals, partials, state, B, K, share_step, parts,
    MARGINALS: tl.constexpr, TOL: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Column sums of all blocks for BC columns; without a tol also h."""
    columns, group = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1).to(tl.int64)
    state += group * (3 * K + 2)
    if tl.load(state + 3 * K + 1) != 0.0:
        return
    sums = sum_partials(partials + group * parts * K, columns, K, parts, BP, BC)
    tl.store(state + 2 * K + columns, sums, mask=columns < K)
    if not TOL:
        share = load_shares(marginals + group * share_step, columns, K, MARGINALS)
        h = tl.load(state + columns, mask=columns < K, other=float("inf"))
        tl.store(state + columns, next_h(h, sums, share, tl.load(state + 3 * K)), mask=columns < K)


@triton.jit
def _settle(marginals, state, K, share_step, tol, MARGINALS: tl.constexpr, BK: tl.constexpr):
    """With a tol: moves h, or says that it stays from now on."""
    columns, group = tl.arange(0, BK), tl.program_id(0).to(tl.int64)
    state += group * (3 * K + 2)
    if tl.load(state + 3 * K + 1) != 0.0:
        return
    share = load_shares(marginals + group * share_step, columns, K, MARGINALS)
    h = tl.load(state + columns, mask=columns < K, other=float("inf"))
    sums, total = tl.load(state + 2 * K + columns, mask=columns < K, other=0.0), tl.load(state + 3 * K)
    settled = is_settled(h, sums, share, total, tol)
    tl.store(state + columns, tl.where(settled, h, next_h(h, sums, share, total)), mask=columns < K)
    tl.store(state + 3 * K + 1, tl.where(settled, 1.0, 0.0))


@triton.jit
def _write(
    scores, marginals, weights, codes, potentials, losses, gradient, state, B, K, share_step, block,
    scale, eighths, sharpness, slope,
    MARGINALS: tl.constexpr, WEIGHTS: tl.constexpr, ISOLATE: tl.constexpr,
    CODES: tl.constexpr, ENTROPY: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Codes, potentials, and each block's loss and gradient."""
    part, group, parts = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    columns, first = tl.arange(0, BK), group * B * K
    state += group * (3 * K + 2)
    share = load_shares(marginals + group * share_step, columns, K, MARGINALS)
    h = tl.load(state + columns, mask=columns < K, other=float("inf"))
    top = tl.load(state + K + columns, mask=columns < K, other=0.0)
    total, lost = tl.load(state + 3 * K), 0.0
    for at in range(0, block, BR):
        rows = (part * block + at + tl.arange(0, BR)).to(tl.int64)
        s = load_scores(scores + first, rows, columns, B, K)
        w = load_weights(weights + group * B, s, share, rows, B, WEIGHTS, ISOLATE)
        p = plan_rows(balanced_scores(s, share, MARGINALS), top, h, scale)
        lost += store_rows(
            codes + first, gradient + first, s, p, w, rows, columns, B, K, total, sharpness, slope,
            CODES, ENTROPY,
        )  # fmt: skip
    if part == 0:
        store_potentials(potentials + group * K, columns, K, h, top, total, eighths)
    if ENTROPY:
        tl.store(losses + group * parts + part, lost)


class Problem:
    """The kernels' arguments for scores (B, K) or (G, B, K), and the tensors that they write."""

    def __init__(self, scores: Tensor, marginals: Tensor | None, weights: Tensor | None, epsilon: float) -> None:
        self.scores = scores.contiguous()
        self.groups = scores.shape[0] if scores.ndim == 3 else 1
        self.rows, self.columns = scores.shape[-2:]
        self.potentials = scores.new_empty((*scores.shape[:-2], self.columns), dtype=torch.float32)
        # A pointer that no kernel reads stands for what is not given.
        self.marginals = self.potentials if marginals is None else marginals.float().contiguous()
        self.weights = self.potentials if weights is None else weights.float().contiguous()
        self.share_step = self.columns if marginals is not None and marginals.ndim == 2 else 0
        self.given = {"MARGINALS": marginals is not None}
        self.eighths = finite(8 / epsilon)
        self.scale = finite(8 * math.log2(math.e) / epsilon)
        self.padded = padded(scores)
        BR, _ = tile(self.columns)
        self.block = BR * triton.cdiv(triton.cdiv(self.rows, BR), PROGRAMS)  # rows of a program, streamed
        self.parts = triton.cdiv(self.rows, self.block)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows, self.columns, self.share_step

    def fits(self, matrices: int) -> bool:
        """Whether one program holds so many matrices of this size."""
        return matrices * math.prod(self.padded) <= ON_CHIP


def finite(number: float) -> float:
    """``number``, or about the largest float32, if it is larger."""
    return min(number, 1e38)


def padded(scores: Tensor) -> list[int]:
    """Rows and columns of a matrix on the chip."""
    return [max(16, triton.next_power_of_2(size)) for size in scores.shape[-2:]]


def suits(scores: Tensor) -> bool:
    """Whether these kernels compute scores of this shape and dtype. Plain torch computes the others."""
    few = scores.ndim == 2 or scores.shape[0] <= MOST_LARGE or 2 * math.prod(padded(scores)) <= ON_CHIP
    return scores.dtype != torch.float64 and 0 < scores.shape[-1] <= WIDEST and scores.numel() > 0 and few


def solve(
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
    temperature: float | None,
    codes: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Potentials, and with a ``temperature`` loss and gradient. Codes go into ``codes``, a contiguous tensor, if given.

    The other arguments are those of :func:`sinkhorn_reference`.
    """
    p = Problem(scores, marginals, weights, epsilon)
    flags = {**p.given, "WEIGHTS": weights is not None, "ISOLATE": isolate}
    BR, BK = tile(p.columns)
    losses = p.potentials.new_empty(p.groups * p.parts)  # at first the blocks' weights
    state = p.potentials.new_empty(p.groups * (3 * p.columns + 2))
    written = (p.scores if codes is None else codes, p.potentials)  # again, a pointer for what is not wanted
    if p.fits(1):
        BB, _ = p.padded
        _one[(p.groups,)](
            p.scores, p.marginals, p.weights, *written, state, *p.shape, num_iters - 1, p.scale, p.eighths,
            0.0 if tol is None else tol, **flags, ENTROPY=temperature is not None, TOL=tol is not None, BB=BB, BK=BK,
            num_warps=warps(BB * BK), **OPTIONS,
        )  # fmt: skip
        if temperature is None:
            return p.potentials, None, None
    else:
        stream(p, flags, num_iters, tol, state, losses)
    gradient = None if temperature is None else torch.empty_like(p.scores)
    _write[(p.parts, p.groups)](
        p.scores, p.marginals, p.weights, *written, losses, p.scores if gradient is None else gradient, state,
        *p.shape, p.block, p.scale, p.eighths, finite(8 * math.log2(math.e) / (temperature or 1.0)),
        finite(1 / (temperature or 1.0)), **flags, CODES=codes is not None, ENTROPY=temperature is not None,
        BR=BR, BK=BK, num_warps=warps(BR * BK), **OPTIONS,
    )  # fmt: skip
    return p.potentials, None if temperature is None else losses.sum(), gradient


def stream(
    p: Problem,
    flags: dict[str, bool],
    num_iters: int,
    tol: float | None,
    state: Tensor,
    totals: Tensor,
    history: list[Tensor] | None = None,
) -> None:
    """Launch what leads to the state of a large matrix: 2 ``num_iters`` kernels, with ``tol`` one more an iteration.

    ``history`` gets a copy of the state after each iteration.
    """
    BR, BK = tile(p.columns)
    grid, tall = (p.parts, p.groups), (triton.cdiv(p.columns, 32), p.groups)
    partials = p.potentials.new_empty(p.groups * p.parts * 2 * p.columns)
    wide = {**flags, "BR": BR, "BK": BK, "num_warps": warps(BR * BK), **OPTIONS}
    sums = {**p.given, "BP": 64, "BC": 32, "num_warps": 4, **OPTIONS}
    read = (p.scores, p.marginals, p.weights)
    for step in range(num_iters):
        if step == 0:
            _start[grid](*read, partials, totals, *p.shape, p.block, p.scale, **wide)
            _sum_start[tall](p.marginals, partials, totals, state, *p.shape, p.parts, p.scale, **sums)
        else:
            _pass[grid](*read, partials, state, *p.shape, p.block, p.scale, **wide)
            _sum_pass[tall](p.marginals, partials, state, *p.shape, p.parts, TOL=tol is not None, **sums)
            if tol is not None:
                last = {**p.given, "BK": BK, "num_warps": warps(BK), **OPTIONS}
                _settle[(p.groups,)](p.marginals, state, p.columns, p.share_step, tol, **last)
        if history is not None:
            history.append(state.clone())


def tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile of the streamed kernels, powers of two."""
    BK = max(16, triton.next_power_of_2(columns))
    return max(1, TILE // BK), BK


def warps(entries: int) -> int:
    """Warps of a program, with 8 entries of its tile to a thread, or 16 in the largest."""
    return min(16, max(1, entries // 256))


def _codes_like(scores: Tensor) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def sinkhorn(scores: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """:func:`sinkhorn_reference` by these kernels."""
    if not suits(scores):
        return sinkhorn_reference(scores, *options)
    codes = _codes_like(scores)
    return codes, solve(scores, *(*options, None, codes))[0]


def sinkhorn_codes(scores, epsilon, num_iters, marginals=None, weights=None, tol=None, isolate=False) -> Tensor:
    """:func:`sinkhorn_codes_reference` by these kernels."""
    return sinkhorn(scores, marginals, weights, epsilon, num_iters, tol, isolate)[0]


def sinkhorn_out(scores: Tensor, *options_and_codes: Any) -> Tensor:
    """:func:`sinkhorn_out_reference` by these kernels."""
    if not suits(scores):
        return sinkhorn_out_reference(scores, *options_and_codes)
    *options, codes = options_and_codes
    return solve(scores, *(*options, None, codes))[0]


def sinkhorn_cross_entropy(scores: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`sinkhorn_cross_entropy_reference` by these kernels."""
    if not suits(scores):
        return sinkhorn_cross_entropy_reference(scores, *options)
    with_codes = options[-1]
    codes = _codes_like(scores) if with_codes else None
    potentials, loss, gradient = solve(scores, *(*options[:-1], codes))
    assert loss is not None and gradient is not None  # as options hold a temperature
    return loss, gradient, potentials, scores.new_empty((0, scores.shape[1])) if codes is None else codes


OPERATORS: dict[str, Any] = {
    "sinkhorn": sinkhorn,
    "sinkhorn_codes": sinkhorn_codes,
    "sinkhorn_out": sinkhorn_out,
    "sinkhorn_cross_entropy": sinkhorn_cross_entropy,
}


def register(operators: dict[str, Any]) -> torch.library.Library:
    """Put these functions behind the operators on CUDA devices, for as long as the returned object lives."""
    library = torch.library.Library("proto_reg", "IMPL", "CUDA")
    for name, function in operators.items():
        library.impl(name, torch.no_grad()(function))
    return library
