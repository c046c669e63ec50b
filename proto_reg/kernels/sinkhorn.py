"""``proto_reg::sinkhorn``: schema, plain-torch reference and registration."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import compute_dtype


def sinkhorn_reference(
    scores: Tensor,
    marginals: Tensor | None,
    mask: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
) -> tuple[Tensor, Tensor]:
    """Balanced codes and column potentials, safe for every finite score in every float dtype.

    From f = 0, ``num_iters`` times ``g_k = log r_k - logsumexp_i(S_ik / eps + f_i)`` and
    ``f_i = -log B - logsumexp_k(S_ik / eps + g_k)``; the codes are ``B exp(S / eps + f + g)``. With f eliminated each
    iteration is one pass: P = softmax over k of ``S / eps + g``, then ``g_k -= log(sum_i P_ik / (B r_k))``. After the
    first step column k of the plan sums to r_k, so ``sum_i P_ik >= r_k``: nothing underflows and nothing is clamped.

    Args:
        scores: (B, K), any float dtype.
        marginals: (K,) target column masses r, or None for 1/K each.
        mask: (B,) bool, True = the row counts in the balance; every row gets codes.
        epsilon: entropic regularisation, > 0, in units of the scores.
        num_iters: iterations (at most, with ``tol``).
        tol: stop once every column is within this relative error of its marginal.
        isolate: treat rows that hold a NaN, a +inf or nothing but -inf as absent and give them NaN codes.

    Returns:
        codes: (B, K) in the dtype of ``scores``, rows sum to 1.
        potentials: (K,) g, so that ``softmax(S / eps + g)`` assigns new rows by the same balance.
    """
    x = scores.to(compute_dtype(scores.dtype))
    if isolate:
        usable = ~(x.isnan() | (x == torch.inf)).any(1) & (x > -torch.inf).any(1)
        mask = usable if mask is None else mask & usable
        x = torch.where(usable[:, None], x, 0.0)

    # Two-sided centring before the division by epsilon: g absorbs column maxima and each softmax row maxima, so that
    # float32 keeps the differences that matter. Only the first column sums see the row maxima.
    lowest = torch.finfo(x.dtype).min
    column_top = _finite_or_zero(_masked(x, mask).amax(0))
    x = torch.where(x == -torch.inf, -torch.inf, (x - column_top).clamp_min(lowest))
    row_top = _finite_or_zero(x.amax(1, keepdim=True))
    x = (x - row_top) / epsilon

    target = x.new_full((x.shape[1],), 1.0 / x.shape[1]) if marginals is None else marginals.to(x)
    target = target / target.sum()
    rows = x.new_full((), float(x.shape[0])) if mask is None else mask.sum().clamp_min(1).to(x.dtype)
    column_mass = _masked(x + row_top / epsilon, mask).logsumexp(0)
    # A column of -inf scores, or of marginal 0, gets nothing; the others are unaffected.
    g = torch.where(column_mass == -torch.inf, -torch.inf, target.log() - column_mass)
    g = _iterate(x, g, rows * target, mask, num_iters - 1, tol)
    if mask is not None:
        g = torch.where(mask.any(), g, 0.0)

    codes = (x + g).softmax(1)
    if isolate:
        codes = torch.where(usable[:, None], codes, torch.nan)
    potentials = torch.where(g == -torch.inf, -torch.inf, (g - column_top / epsilon).clamp_min(lowest))
    return codes.to(scores.dtype), potentials


def _iterate(x: Tensor, g: Tensor, target: Tensor, mask: Tensor | None, passes: int, tol: float | None) -> Tensor:
    """``passes`` further iterations of the column potentials g (K,) towards the column sums ``target`` (K,)."""
    for _ in range(passes):
        p = (x + g).softmax(1)
        column = p.sum(0) if mask is None else torch.where(mask[:, None], p, 0.0).sum(0)
        updated = torch.where(column == 0, -torch.inf, g - (column / target).log())
        if tol is None:
            g = updated
            continue
        error = torch.where(target > 0, (column / target - 1).abs(), 0.0).amax()
        converged = error <= tol
        if x.device.type == "cpu" and bool(converged):
            break
        # On a device the test stays there: once converged, the potentials no longer move.
        g = torch.where(converged, g, updated)
    return g


def _finite_or_zero(top: Tensor) -> Tensor:
    """Maxima, those over nothing but -inf replaced by 0, which shifts nothing."""
    return torch.where(top == -torch.inf, 0.0, top)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask[:, None], x, -torch.inf)


torch.library.define(
    "proto_reg::sinkhorn",
    "(Tensor scores, Tensor? marginals, Tensor? mask, float epsilon, int num_iters, float? tol, bool isolate)"
    " -> (Tensor codes, Tensor potentials)",
)
torch.library.impl("proto_reg::sinkhorn", "CompositeExplicitAutograd")(sinkhorn_reference)


@torch.library.register_fake("proto_reg::sinkhorn")
def _fake(
    scores: Tensor,
    marginals: Tensor | None,
    mask: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(scores, memory_format=torch.contiguous_format)
    return codes, scores.new_empty((scores.shape[1],), dtype=compute_dtype(scores.dtype))


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx, *gradients):
    return (None,) * 7


# Codes are targets, not predictions (SwAV): said here, so that autograd never has to guess.
torch.library.register_autograd("proto_reg::sinkhorn", _backward, setup_context=_setup_context)
