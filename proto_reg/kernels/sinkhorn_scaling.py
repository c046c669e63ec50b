"""Sinkhorn in plain torch by scaling vectors: exponentials are taken once. ``sinkhorn_reference`` calls it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sinkhorn_log import centre, finite_or_zero, masked

# While S / eps spans less than this, exp(S / eps) and the scaling vectors stay within float32.
SAFE_RANGE = 40.5
# Up to so many elements one common reference is accurate enough.
SMALL = 1 << 16
LEAST = 1e-37  # of the inverse of a scaling factor


def scale(
    x: Tensor,
    reference: Tensor,
    high: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    with_potentials: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute E = exp((S - reference) / eps) once. Then only scaling vectors change, by matrix-vector products."""
    per_score = math.log2(math.e) / epsilon  # exp2() is several times as fast as exp()
    e = (x - reference).mul_(per_score).exp2_()
    u = None if reference is high else (reference - high).mul_(per_score).exp2_().squeeze(1)
    if weights is not None:
        weights = weights.to(e)
        u = weights if u is None else u.mul_(weights)
    total = float(x.shape[0]) if weights is None else float(weights.sum())
    share = 1 / x.shape[1] if marginals is None else marginals
    # The factor that all columns share is left out of v and kept here: it would grow out of range over many
    # iterations.
    alike = total / x.shape[1] if marginals is None else total
    rescale = num_iters > 4 or not 1e-3 < alike < 1e3
    left_out = []
    sums = e.sum(0) if u is None else _column_sums(e, u)
    v = sums.reciprocal_() if marginals is None else marginals / sums
    for _ in range(num_iters - 1):
        u = torch.mv(e, v).reciprocal_()
        sums = _column_sums(e, u if weights is None else u.mul_(weights))
        if tol is not None and bool(((v * sums / (total * share) - 1).abs().nan_to_num_(0.0) <= tol).all()):
            break
        v = sums.reciprocal_() if marginals is None else marginals / sums
        if rescale:
            v.mul_(alike)
        else:
            left_out.append(alike)
    if x.numel() < SMALL:
        u = torch.mv(e, v).reciprocal_()
        codes = e.mul_(v).mul_(u.unsqueeze(1))
    else:  # sum() adds in pairs, which is more accurate for long rows
        codes = e.mul_(v).mul_(e.sum(1, keepdim=True).reciprocal_())
    if not with_potentials:
        return codes, None
    uniform = -math.log(x.shape[1]) if marginals is None else 0.0
    return codes, v.log_().add_(uniform + sum(map(math.log, left_out)) - float(high) / epsilon)


def scale_groups(
    x: Tensor,
    reference: Tensor,
    high: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
) -> tuple[Tensor, Tensor]:
    """:func:`scale` for groups (G, B, K), by products of one matrix each."""
    per_score = math.log2(math.e) / epsilon
    rows, columns = x.shape[1:]
    e = (x - reference).mul_(per_score).exp2_()
    u = (reference - high).mul_(per_score).exp2_()
    total = e.new_tensor(rows) if weights is None else weights.sum(1)[:, None, None].to(e)
    w = None if weights is None else weights[..., None].to(e) * (rows / total)
    target = rows / columns if marginals is None else rows * marginals.view(-1, 1, columns)
    v = target / _group_sums(e, u if w is None else u.mul_(w))
    for _ in range(num_iters - 1):
        u = torch.bmm(e, v.mT).reciprocal_()
        v = target / _group_sums(e, u if w is None else u.mul_(w))
    codes = e.mul_(v)
    codes.div_(codes.sum(2, keepdim=True))
    return codes, (v.log_() - total.log() - high / epsilon).squeeze(1)


def _group_sums(e: Tensor, u: Tensor, rows: int = 256) -> Tensor:
    """Column sums (G, 1, K) of E (G, B, K) times u (G, B, 1)."""
    return torch.bmm(u.mT, e) if e.shape[1] <= rows else (e * u).sum(1, keepdim=True)


def exact_products() -> bool:
    """Whether products of matrices keep float32 on the CPU."""
    chosen = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return chosen in ("none", "ieee") and not torch.is_autocast_enabled("cpu")


def _column_sums(e: Tensor, u: Tensor, rows: int = 256) -> Tensor:
    """``u @ e`` in stretches of ``rows``: one matrix-vector product would add a column up one by one."""
    if e.shape[0] <= rows:
        return torch.mv(e.t(), u)
    whole = e.shape[0] - e.shape[0] % rows
    sums = torch.bmm(u[:whole].view(-1, 1, rows), e[:whole].view(-1, rows, e.shape[1])).sum((0, 1))
    return sums if whole == e.shape[0] else sums + torch.mv(e[whole:].t(), u[whole:])


def scale_plans(
    x: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    with_potentials: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`balance_logits` without a graph or ``tol``, in half as many operations.

    The first iteration gives a plan E whose rows sum to 1. Then only scaling vectors change: ``u = 1 / E v`` and
    ``v = r / E^T u``. In each iteration u v grows by at most B K (with marginals B K / r), so E is computed
    again before an entry that underflowed could count.
    """
    if marginals is not None:
        x = torch.where((marginals == 0).unsqueeze(-2) & (x < torch.inf), -torch.inf, x)
    counted = total = w = None
    if weights is not None:
        counted, total = weights > 0, weights.sum(-1, keepdim=True).to(x.dtype)
        w = weights * (x.shape[-2] / torch.where(total > 0, total, 1.0))
    tops = masked(x, counted).amax(-2)
    tops = tops.clamp_min_(torch.finfo(x.dtype).min) if w is None else finite_or_zero(tops)
    below, x = centre(x, tops, epsilon)
    # Means instead of sums keep both vectors near 1. h is minus the potential, but for a constant; inf: gets nothing.
    h = _mean_over_rows(masked(below, counted).exp_(), w).log_().nan_to_num_(torch.nan, torch.inf, torch.inf)
    shares = None if marginals is None else x.shape[-1] * marginals
    h = h if shares is None else h - shares.log()
    period, inverse = 4 if shares is None else 2, h  # the first iteration replaces it
    for iteration in range(num_iters - 1):
        if iteration % period == 0:
            h = h if iteration == 0 else h + (inverse * x.shape[-1]).log_()
            e, u = (x - h[..., None, :]).softmax(-1), w
            if counted is not None:  # a row that does not count may hold a NaN
                e = torch.where(counted[..., None], e, 1.0)
        else:
            u = (e / inverse[..., None, :]).mean(-1)
            u = u.reciprocal_() if w is None else w / u
        inverse = _mean_over_rows(e, u).clamp_min_(LEAST)  # of v
        inverse = inverse if shares is None else (inverse / shares).clamp_(LEAST, 1 / LEAST)
    h = h if num_iters == 1 else h + inverse.log_()
    h = h if total is None else torch.where(total > 0, h, 0.0)
    codes = (x - h[..., None, :]).softmax(-1)
    return codes, _potentials(h, tops / epsilon, x, total, min(num_iters, 2)) if with_potentials else None


def _potentials(h: Tensor, shift: Tensor, x: Tensor, total: Tensor | None, lost: int) -> Tensor:
    """Potentials (..., K) from ``h``. Means have left out the total, and K ``lost`` times."""
    # math.log() of a size would fix it in a torch.export.
    rows = x.new_full((1,), x.shape[-2]) if total is None else torch.where(total > 0, total, 1.0)
    left_out = rows.log() + lost * x.new_full((1,), x.shape[-1]).log()
    largest = torch.finfo(x.dtype).max
    g = torch.where(h == torch.inf, -torch.inf, (-h - left_out - shift).clamp(-largest, largest))
    return g if total is None else torch.where(total > 0, g, 0.0)


def _mean_over_rows(e: Tensor, u: Tensor | None) -> Tensor:
    """The columns' means (..., K) of the rows times u (..., B)."""
    return (e if u is None else e * u[..., None]).mean(-2)
