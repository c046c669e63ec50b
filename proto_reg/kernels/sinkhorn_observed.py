"""Sinkhorn with a count of its iterations, as an operator, and in plain torch with slack; errors and warm starts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._distributed import sum_
from .sinkhorn_log import (
    balance_logits,
    centre,
    centred,
    column_masses,
    ended,
    finite_or_zero,
    least_error,
    log_or_zero,
    readable,
)
from .sinkhorn_reference import isolated, normalised, usable_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sinkhorn_observed(
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
    slack: float | None,
    differentiable: bool,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sinkhorn_reference` in the dtype of the computation, and the iterations of each problem, (G,) or ().

    ``slack``: see :func:`relaxed_logits`. With ``differentiable`` autograd goes back through every iteration.
    """
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        x, weights, usable = usable_rows(scores, marginals, weights, isolate, or_absent=differentiable)
        marginals, weights = (y if y is None else torch.where(y > 0, y, 0.0) for y in (marginals, weights))
        options = (x, normalised(marginals, x), weights, epsilon, num_iters, tol)
        # Without tol every problem takes all iterations.
        counter = x.new_full((*x.shape[:-2], 1), num_iters if tol is None else 1, dtype=torch.int64)
        if slack is None:
            codes, potentials = balance_logits(*options, group, counter=counter)
        else:
            codes, potentials = relaxed_logits(*options, slack, counter)
        codes = isolated(codes, usable)
    return codes, potentials, counter.squeeze(-1)


torch.library.define(
    "proto_reg::sinkhorn_counted",
    "(Tensor scores, Tensor? marginals, Tensor? weights, float epsilon, int num_iters, float? tol, bool isolate) -> "
    "(Tensor codes, Tensor potentials, Tensor iterations)",
)
torch.library.impl("proto_reg::sinkhorn_counted", "CompositeExplicitAutograd")(
    torch.no_grad()(partial(sinkhorn_observed, slack=None, differentiable=False))
)
torch.library.impl("proto_reg::sinkhorn_counted", "Autograd")(torch.library.fallthrough_kernel)  # codes are targets


@torch.library.register_fake("proto_reg::sinkhorn_counted")
def _fake(scores: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty_like(scores, memory_format=torch.contiguous_format)
    leading = scores.shape[:-2]
    return codes, scores.new_empty((*leading, scores.shape[-1])), scores.new_empty(leading, dtype=torch.int64)


def relaxed_logits(
    x: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    slack: float,
    counter: Tensor,
) -> tuple[Tensor, Tensor]:
    """Iterations that draw columns towards their marginals r, codes (..., B, K) and potentials (..., K).

    ``slack`` tau damps the step of the columns (Chizat et al. 2018, Algorithm 1 with the KL row of Table 1):
    ``g_k = tau / (tau + eps) (log r_k - logsumexp_i(log w_i + S_ik / eps + f_i))``. The step of the rows is as without.
    All is in the log domain, because a column may keep any mass, however small. ``tol`` bounds the relative change that
    one more iteration makes to exp(g).
    """
    logits, x, log_weights, tops, top = centred(x, marginals, weights, epsilon)
    alive = tops != -torch.inf
    # A shift of all columns alike changes no code, and the small numbers that are left keep their digits.
    offset = (top - finite_or_zero(tops.amax(-1, keepdim=True))) / epsilon
    target = x.new_full((x.shape[-1],), 1.0 / x.shape[-1]) if marginals is None else marginals
    log_target, rate, g = log_or_zero(target, target > 0), slack / (slack + epsilon), x.new_zeros(())
    for iteration in range(num_iters):
        mass, total = column_masses(logits + log_weights, alive, weights)
        mass = mass - log_or_zero(total, total > 0)
        updated = torch.where(alive, rate * (log_target - mass) + (1 - rate) * offset, -torch.inf)
        updated = torch.where(total > 0, updated, 0.0)
        if tol is not None and iteration > 0:
            wanted = relaxed_shares(marginals, g - offset, epsilon / slack).log()
            error = rate * torch.where(alive, (mass + g - wanted).expm1().abs(), 0.0).amax(-1, keepdim=True)
            settled = error <= least_error(g).clamp_min(tol)
            updated = torch.where(settled, g, updated)
            counter += ~settled
            if readable(x) and ended(settled, error, tol):
                break
        g = updated
        logits = x - (x + g[..., None, :]).logsumexp(-1, keepdim=True)
    return (x + g[..., None, :]).softmax(-1), torch.where(alive, g - offset, g)


def relaxed_shares(marginals: Tensor | None, potentials: Tensor, ratio: float) -> Tensor:
    """What slack asks of the columns at these potentials (..., K): shares proportional to ``r_k exp(-eps / tau g_k)``.

    ``ratio`` is eps / tau. Where the columns' masses have these shares, an iteration moves nothing.
    """
    r = torch.ones_like(potentials) if marginals is None else marginals.to(potentials)
    lost = (r == 0) | (potentials == -torch.inf)
    drawn = log_or_zero(r, r > 0) - ratio * torch.where(lost, 0.0, potentials)
    return torch.where(lost, -torch.inf, drawn).softmax(-1)


@torch.no_grad()
def column_errors(
    codes: Tensor,
    wanted: Tensor | None,
    weights: Tensor | None,
    isolate: bool,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The largest relative error of the columns' masses, (G,) or (); ``wanted`` (..., K) shares, None for 1/K each.

    Columns without mass do not count: what they do not take belongs to the others. Nor do NaN rows if ``isolate``.
    """
    if isolate:
        counted = ~codes[..., 0].isnan()
        weights = counted.to(codes) if weights is None else torch.where(counted, weights.to(codes), 0.0)
    if weights is None:
        masses = codes.sum(-2)
    else:
        masses = torch.where(weights[..., None] > 0, weights[..., None].to(codes) * codes, 0.0).sum(-2)
    masses = sum_(masses, group)
    wanted = torch.ones_like(masses) if wanted is None else wanted.to(masses).expand_as(masses)
    gone = masses == 0
    wanted = torch.where(gone, 0.0, wanted)
    wanted = wanted * (masses.sum(-1, keepdim=True) / wanted.sum(-1, keepdim=True))
    return torch.where(gone, 0.0, (masses / torch.where(gone, 1.0, wanted) - 1).abs()).amax(-1)


def warm_logits(
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    potentials: Tensor,
    group: ProcessGroup | None = None,
) -> Tensor:
    """``log softmax(S / eps + g) - log W`` (..., B, K). On these Sinkhorn with epsilon 1 goes on from g (..., K).

    That is S / eps plus g and plus the row potentials that belong to g; so potentials add up. Prototypes without a
    share become 0.
    """
    if weights is None:
        total = scores.new_full((), float(scores.shape[-2]))
    else:  # a weight of 0 gets no gradient
        total = torch.where(weights > 0, weights, 0.0).sum(-1).to(scores)
    total = sum_(total, group)[..., None, None]
    log_total = log_or_zero(total, total > 0)
    if marginals is None:
        return centre(scores, -epsilon * potentials, epsilon)[1].log_softmax(-1) - log_total
    absent = (marginals == 0).unsqueeze(-2) & (scores < torch.inf)
    _, logits = centre(torch.where(absent, -torch.inf, scores), -epsilon * potentials, epsilon)
    return torch.where(absent, 0.0, logits.log_softmax(-1) - log_total)
