"""Sinkhorn with a graph: codes and potentials whose backward pass is in sinkhorn_gradient.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .first_order import Once, transforming
from .sinkhorn_gradient import implicit_gradient, sinkhorn_gradient_reference
from .sinkhorn_log import balance_logits
from .sinkhorn_reference import isolated, normalised, sinkhorn_reference, usable_rows


class Iterations(torch.autograd.Function):
    """Codes and potentials of :func:`sinkhorn_reference`, differentiable by scores, marginals and weights.

    ``chosen``: the backend. ``implicit``: the gradient at the fixed point; the potentials are constants. Else a second
    derivative goes through :func:`balance_logits`, whose graph holds all iterations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        chosen: str,
        implicit: bool,
        scores: Tensor,
        marginals: Tensor | None,
        weights: Tensor | None,
        epsilon: float,
        num_iters: int,
        tol: float | None,
    ) -> tuple[Tensor, Tensor]:
        solve = sinkhorn_reference if chosen == "torch" else torch.ops.proto_reg.sinkhorn.default
        codes, potentials = solve(scores, marginals, weights, epsilon, num_iters, tol, False)
        ctx.options = epsilon, num_iters, tol
        # The CUDA library has no kernel for it.
        ctx.plain, ctx.implicit = chosen not in ("cpu", "triton"), implicit
        ctx.save_for_backward(scores, marginals, weights, codes if implicit else None)
        ctx.set_materialize_grads(False)
        if implicit:
            ctx.mark_non_differentiable(potentials)
        return codes, potentials

    @staticmethod
    def backward(ctx: Any, by_codes: Tensor | None, by_potentials: Tensor | None) -> tuple[Tensor | None, ...]:
        scores, marginals, weights, codes = ctx.saved_tensors
        epsilon, num_iters, tol = ctx.options
        by_codes = torch.zeros_like(scores) if by_codes is None else by_codes
        twice = torch.is_grad_enabled()  # create_graph=True
        found: Sequence[Tensor | None]
        if twice and not ctx.implicit:
            found = _with_graph(scores, marginals, weights, ctx.options, by_codes, by_potentials)
            return None, None, *found, None, None, None
        with torch.no_grad():
            if ctx.implicit:
                by_scores, by_marginals, by_weights = implicit_gradient(codes, marginals, weights, epsilon, by_codes)
            else:
                operator: Callable[..., tuple[Tensor, Tensor, Tensor]]
                operator = sinkhorn_gradient_reference if ctx.plain else torch.ops.proto_reg.sinkhorn_gradient.default
                by_scores, by_marginals, by_weights = operator(
                    scores, marginals, weights, epsilon, num_iters, tol, by_codes, by_potentials
                )
        if twice:
            message = (
                "sinkhorn: expected differentiable='implicit' to be differentiated once, got a second derivative. Use "
                "differentiable=True for that."
            )
            by_scores = Once.apply(by_scores, scores, message)
        if marginals is not None and marginals.ndim < by_marginals.ndim:  # the groups share them
            by_marginals = by_marginals.sum(0)
        found = (None if marginals is None else by_marginals, None if weights is None else by_weights)
        return None, None, by_scores, *found, None, None, None


def _with_graph(
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    options: tuple[float, int, float | None],
    by_codes: Tensor,
    by_potentials: Tensor | None,
) -> list[Tensor | None]:
    """The gradient by scores, marginals and weights, itself differentiable."""
    x = scores.view_as(scores)
    marginals, weights = (y if y is None else y.view_as(y) for y in (marginals, weights))
    epsilon, num_iters, tol = options
    outputs = balance_logits(x, marginals, weights, epsilon, num_iters, tol)
    inputs = x, marginals, weights
    wanted = [y for y in inputs if y is not None and y.requires_grad]
    by = (by_codes,) if by_potentials is None else (by_codes, by_potentials)
    found = iter(torch.autograd.grad(outputs[: len(by)], wanted, by, create_graph=True, materialize_grads=True))
    return [next(found) if y is not None and y.requires_grad else None for y in inputs]


def differentiable_codes(
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
    *,
    backend: str,
    implicit: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`sinkhorn_reference` with a graph by scores, marginals and weights, which holds no iteration.

    Where a marginal or weight is 0, its column or row is left out and its gradient is 0.
    """
    x, weights, usable = usable_rows(scores, marginals, weights, isolate, or_absent=True)
    marginals, weights = (y if y is None else torch.where(y > 0, y, 0.0) for y in (marginals, weights))
    arguments = x, normalised(marginals, x), weights, epsilon, num_iters, tol
    if transforming() or torch.autograd.forward_ad._current_level >= 0:
        codes, potentials = balance_logits(*arguments)
    else:
        codes, potentials = Iterations.apply(backends.choose(backend, x), implicit, *arguments)
    codes = isolated(codes, usable)
    return codes.to(scores.dtype), potentials
