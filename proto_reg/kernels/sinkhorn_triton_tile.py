"""What Triton's programs compute of a tile of scores. sinkhorn_triton.py and sinkhorn_triton_gradient.py call it.

Logarithms are to base 2, scores in eighths, so that no difference overflows. ``s`` is a tile of scores, ``w`` the rows'
weights, ``share`` the columns' shares and ``top`` their maxima. ``h`` is minus a column's potential; inf means that it
gets nothing.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit
def load_scores(scores, rows, columns, B, K):
    """Scores of a tile in eighths; -inf beyond the matrix."""
    inside = (rows[:, None] < B) & (columns[None, :] < K)
    at = rows[:, None] * K + columns[None, :]
    return tl.load(scores + at, mask=inside, other=-float("inf")).to(tl.float32) * 0.125


@triton.jit
def load_shares(marginals, columns, K, MARGINALS: tl.constexpr):
    """The columns' shares; 0 beyond the matrix."""
    share = tl.where(columns < K, 1.0 / K, 0.0)
    if MARGINALS:
        share = tl.load(marginals + columns, mask=columns < K, other=0.0)
    return share


@triton.jit
def load_weights(weights, s, share, rows, B, WEIGHTS: tl.constexpr, ISOLATE: tl.constexpr):
    """The rows' weights; 0 beyond the matrix and for isolated rows. ``share`` is a tile's row."""
    w = tl.where(rows < B, 1.0, 0.0)
    if WEIGHTS:
        w = tl.load(weights + rows, mask=rows < B, other=0.0)
    if ISOLATE:
        bad = tl.max(tl.where(s < float("inf"), 0, 1), 1)
        possible = tl.max(tl.where((s > -float("inf")) & (share[None, :] > 0.0), 1, 0), 1)
        w = tl.where((bad == 0) & (possible == 1), w, 0.0)
    return w


@triton.jit
def balanced_scores(s, share, MARGINALS: tl.constexpr):
    """Scores that take part in the balance: a column without a share offers nothing."""
    if MARGINALS:
        s = tl.where((share[None, :] == 0.0) & (s < float("inf")), -float("inf"), s)
    return s


@triton.jit
def column_tops(s, w):
    """The columns' maxima over the rows with a weight; -inf for an empty column."""
    return tl.max(tl.where(w[:, None] > 0.0, s, -float("inf")), 0)


@triton.jit
def column_masses(s, w, top, scale):
    """Weighted sums of exponentials below ``top``, which is -inf for an empty column."""
    finite = tl.where(top == -float("inf"), 0.0, top)
    e = tl.exp2((s - finite[None, :]) * scale)
    return tl.sum(tl.where(w[:, None] > 0.0, w[:, None] * e, 0.0), 0)


@triton.jit
def first_h(mass, share, total):
    """The first h, from the columns' masses. A column without a share has inf, always."""
    h = tl.where(mass == 0.0, float("inf"), tl.log2(mass) - tl.log2(share * total))
    return tl.where(share == 0.0, float("inf"), tl.where(total > 0.0, h, 0.0))


@triton.jit
def plan_rows(s, top, h, scale):
    """Rows of the plan, each of sum 1: softmax of the scores less their columns' and rows' maxima, less h."""
    below = s - top[None, :]
    # The rounding error of the subtraction (Knuth's two-sum).
    back = below - s
    lost = (s - (below - back)) - (top[None, :] + back)
    x = (below - tl.max(below, 1)[:, None]) + tl.where(lost == lost, lost, 0.0)
    y = x * scale - h[None, :]
    e = tl.exp2(y - tl.max(y, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def column_sums(p, w):
    """Weighted sums of the rows of the plan ``p``."""
    return tl.sum(tl.where(w[:, None] > 0.0, w[:, None] * p, 0.0), 0)


@triton.jit
def next_h(h, sums, share, total):
    """h after an iteration with these column sums. A column of sum 0 stays as it is."""
    return tl.where((sums == 0.0) | (share == 0.0), h, h + (tl.log2(sums) - tl.log2(share * total)))


@triton.jit
def is_settled(h, sums, share, total, tol):
    """Whether every column is within tol of its target, or as near as float32 can tell; all columns at once."""
    gone = sums == 0.0
    left = tl.sum(tl.where(gone, 0.0, share), 0) / tl.sum(share, 0)
    met = tl.where(gone, 1.0, sums) / tl.where(gone, 1.0, share * total)
    wrong = tl.where(gone, 0.0, tl.abs(met * left - 1.0))
    size = tl.max(tl.where(tl.abs(h) < float("inf"), tl.abs(h), 0.0), 0) * 0.6931472
    allowed = tl.maximum(tol, size * 1.1920929e-07)
    return tl.sum(tl.where(wrong <= allowed, 0, 1), 0) == 0


@triton.jit
def solve_on_chip(
    scores, marginals, weights, history, rows, columns, B, K, passes, scale, tol,
    MARGINALS: tl.constexpr, WEIGHTS: tl.constexpr, ISOLATE: tl.constexpr, TOL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One problem on the chip: scores, weights, shares, total, maxima, the first h, the last h, how often h moved.

    If it is to ``KEEP`` them, ``history`` (passes, K) gets h before each pass.
    """
    s = load_scores(scores, rows, columns, B, K)
    share = load_shares(marginals, columns, K, MARGINALS)
    w = load_weights(weights, s, share, rows, B, WEIGHTS, ISOLATE)
    s, total = balanced_scores(s, share, MARGINALS), tl.sum(w, 0)
    top = column_tops(s, w)
    start = first_h(column_masses(s, w, top, scale), share, total)
    top = tl.where(top == -float("inf"), 0.0, top)
    h, settled, moves = start, total == 0.0, 0
    for step in range(passes):
        sums = column_sums(plan_rows(s, top, h, scale), w)
        if TOL:
            settled = settled | is_settled(h, sums, share, total, tol)
        if KEEP:
            tl.store(history + step * K + columns, h, mask=columns < K)
            moves += tl.where(settled, 0, 1)
        h = tl.where(settled, h, next_h(h, sums, share, total))
    return s, w, share, total, top, start, h, moves


@triton.jit
def store_potentials(potentials, columns, K, h, top, total, eighths):
    g = -(h + tl.log2(tl.where(total > 0.0, total, 1.0))) * 0.6931472 - top * eighths
    g = tl.minimum(tl.maximum(g, -3.4028234663852886e38), 3.4028234663852886e38)
    g = tl.where(h == float("inf"), -float("inf"), tl.where(h == h, g, h))
    tl.store(potentials + columns, tl.where(total > 0.0, g, 0.0), mask=columns < K)


@triton.jit
def store_rows(
    codes, gradient, s, p, w, rows, columns, B, K, total, sharpness, slope,
    CODES: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Writes codes and gradient of a tile; returns the sum of its losses. ``slope`` is 1 / temperature."""
    inside = (rows[:, None] < B) & (columns[None, :] < K)
    at = rows[:, None] * K + columns[None, :]
    loss = 0.0
    if ENTROPY:
        below = s - tl.max(s, 1)[:, None]
        e = tl.exp2(below * sharpness)
        norm = tl.sum(e, 1)
        share = w / tl.where(total > 0.0, total, 1.0)
        terms = tl.sum(tl.where((p == 0.0) | (columns[None, :] >= K), 0.0, p * (below * sharpness)), 1)
        loss = tl.sum(tl.where(w > 0.0, share * ((tl.log2(norm) - terms) * 0.6931472), 0.0), 0)
        slopes = share[:, None] * slope * (e / norm[:, None] - p)
        slopes = tl.where(w[:, None] > 0.0, slopes, 0.0)
        tl.store(gradient + at, slopes.to(gradient.dtype.element_ty), mask=inside)
    if CODES:
        tl.store(codes + at, p.to(codes.dtype.element_ty), mask=inside)
    return loss


@triton.jit
def sum_partials(partials, columns, K, parts, BP: tl.constexpr, BC: tl.constexpr):
    """Sums over all blocks of ``partials`` (parts, K), for BC columns."""
    sums = tl.zeros((BC,), tl.float32)
    for at in range(0, parts, BP):
        own = at + tl.arange(0, BP)
        inside = (own[:, None] < parts) & (columns[None, :] < K)
        sums += tl.sum(tl.load(partials + own[:, None] * K + columns[None, :], mask=inside, other=0.0), 0)
    return sums
