"""Gradients through Sinkhorn's iterations, in plain torch and as an operator, in memory that does not grow with them.

Only the arguments are kept for the backward pass. It runs the iterations again, keeps their column potentials, and goes
through them backwards. Let ``P = softmax_k(S / eps + g)``, with column sums ``c_k = sum_i w_i P_ik``. Let a be the
gradient by the potentials after an iteration, ``b = a / c`` and ``h = P b``. Then the iteration adds

    ``w_i P_ik (h_i - b_k)`` to the gradient by S / eps,
    ``m - h_i`` to that by w_i, with ``m = sum_k a_k / W``,
    ``a_k / r_k`` to that by r_k.

The gradient by the potentials before it is ``sum_i w_i P_ik h_i``. The code leaves m out of b and h: there it cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sinkhorn_log import Step, iterate, start_of_iterations

MOST_CONJUGATE_STEPS = 100


def sinkhorn_gradient_reference(
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    by_codes: Tensor,
    by_potentials: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a loss through all iterations of :func:`balance_logits`.

    Args:
        scores: (B, K) or (G, B, K), float32 or float64. Rows of weight 0 hold no NaN.
        marginals: (K,) or (G, K), summing to 1.
        weights: (B,) or (G, B) >= 0.
        by_codes: like ``scores``, the loss's gradient by the codes.
        by_potentials: (K,) or (G, K), that by the potentials; None for 0.

    Returns:
        by_scores: like ``scores``; 0 at scores of -inf.
        by_marginals: (K,) or (G, K), and by_weights: like ``weights``; 0 where the share or weight is 0, and (0,) where
            there are none.
    """
    steps: list[Step] = []
    start = start_of_iterations(scores, marginals, weights, epsilon)
    g = iterate(start, weights, num_iters - 1, tol, steps=steps)
    x, total = start.x, start.total
    row_weights = x.new_ones(x.shape[:-1]) if weights is None else weights.to(x.dtype)
    by_x, a = through_codes((x + g[..., None, :]).softmax(-1), by_codes)
    a = a if by_potentials is None else a + torch.where(g == -torch.inf, 0.0, by_potentials)
    a = torch.where(total > 0, a, 0.0)
    # Of b, weighted with c: the same in every iteration, and of no effect on the scores.
    mean = torch.where(total > 0, a.sum(-1, keepdim=True) / total, 0.0)
    sums, by_rows = torch.zeros_like(a), torch.zeros_like(row_weights)
    for before, settled in reversed(steps):
        p = (x + before[..., None, :]).softmax(-1)
        column = (p * row_weights[..., None]).sum(-2)
        b = torch.where(column == 0, 0.0, a / torch.where(column == 0, 1.0, column) - mean)
        if settled is not None:
            b = torch.where(settled, 0.0, b)
        h = (p @ b[..., None]).squeeze(-1)
        by_x += row_weights[..., None] * p * (h[..., None] - b[..., None, :])
        by_rows -= h
        sums += a if settled is None else torch.where(settled, 0.0, a)
        updated = ((row_weights * (h + mean))[..., None, :] @ p).squeeze(-2)
        a = updated if settled is None else torch.where(settled, a, updated)
    # The first iteration: each column's softmax over the rows.
    alive = (start.g > -torch.inf) & (start.mass > -torch.inf)
    logits = start.logits - torch.where(alive, start.mass, 0.0)[..., None, :]
    mine = torch.where(row_weights[..., None] > 0, logits.exp(), 0.0) * torch.where(alive, a, 0.0)[..., None, :]
    by_x -= mine
    by_rows -= mine.sum(-1) / torch.where(row_weights > 0, row_weights, 1.0)
    by_marginals, by_weights = x.new_empty(0), x.new_empty(0)
    if marginals is not None:
        by_marginals = torch.where(marginals > 0, (sums + a) / torch.where(marginals > 0, marginals, 1.0), 0.0)
    if weights is not None:
        by_weights = torch.where(weights > 0, by_rows, 0.0)
    return by_x.div_(epsilon), by_marginals, by_weights


def implicit_gradient(
    codes: Tensor, marginals: Tensor | None, weights: Tensor | None, epsilon: float, by_codes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient at the fixed point of the iterations (Luise et al., 2018), from its codes (..., B, K) alone.

    The sum of all a above solves ``(diag(c) - P^T diag(w) P) beta = a``, b in place of a / c. Conjugate gradients solve
    it, at two products of the matrix with a vector a step. Returns what :func:`sinkhorn_gradient_reference` does.
    """
    row_weights = codes.new_ones(codes.shape[:-1]) if weights is None else weights.to(codes.dtype)
    by_x, a = through_codes(codes, by_codes)
    column = (codes * row_weights[..., None]).sum(-2)
    b = _solve_adjoint(codes, column, row_weights, a)
    h = (codes @ b[..., None]).squeeze(-1)
    by_x += row_weights[..., None] * codes * (h[..., None] - b[..., None, :])
    total, by_marginals, by_weights = row_weights.sum(-1, keepdim=True), codes.new_empty(0), codes.new_empty(0)
    if marginals is not None:
        by_marginals = torch.where(marginals > 0, total * b, 0.0)
    if weights is not None:
        mean = (column * b).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
        by_weights = torch.where(weights > 0, mean - h, 0.0)
    return by_x.div_(epsilon), by_marginals, by_weights


def through_codes(codes: Tensor, by_codes: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a loss through each row's softmax, by S / eps (..., B, K), and its column sums (..., K)."""
    mean = (codes * by_codes).sum(-1, keepdim=True)
    by_x = torch.where(codes == 0, 0.0, codes * (by_codes - mean))
    return by_x, by_x.sum(-2)


def _solve_adjoint(p: Tensor, column: Tensor, weights: Tensor, a: Tensor) -> Tensor:
    """beta (..., K) by conjugate gradients, preconditioned with the diagonal ``column``.

    beta is free up to a constant, which changes no gradient. The steps end at the dtype's rounding error.
    """
    at_hand = p.is_cpu and not torch.compiler.is_compiling()
    inverse = torch.where(column > 0, 1 / torch.where(column > 0, column, 1.0), 0.0)
    mass = column.sum(-1, keepdim=True)
    left = a - column * (a.sum(-1, keepdim=True) / torch.where(mass > 0, mass, 1.0))
    beta, direction = torch.zeros_like(left), left * inverse
    size = (left * direction).sum(-1, keepdim=True)
    enough = size * torch.finfo(p.dtype).eps ** 2
    for _ in range(min(p.shape[-1], MOST_CONJUGATE_STEPS)):
        h = (p @ direction[..., None]).squeeze(-1) * weights
        image = column * direction - (h[..., None, :] @ p).squeeze(-2)
        curvature = (direction * image).sum(-1, keepdim=True)
        going = (size > enough) & (curvature > 0)
        if at_hand and not bool(going.any()):
            break
        step = torch.where(going, size / torch.where(going, curvature, 1.0), 0.0)
        beta = beta + step * direction
        left = left - step * image
        scaled = left * inverse
        before, size = size, (left * scaled).sum(-1, keepdim=True)
        direction = scaled + torch.where(going, size / torch.where(going, before, 1.0), 0.0) * direction
    return beta


torch.library.define(
    "proto_reg::sinkhorn_gradient",
    "(Tensor scores, Tensor? marginals, Tensor? weights, float epsilon, int num_iters, float? tol, Tensor by_codes, "
    "Tensor? by_potentials) -> (Tensor by_scores, Tensor by_marginals, Tensor by_weights)",
)
torch.library.impl("proto_reg::sinkhorn_gradient", "CompositeExplicitAutograd")(
    torch.no_grad()(sinkhorn_gradient_reference)
)


@torch.library.register_fake("proto_reg::sinkhorn_gradient")
def _fake(scores: Tensor, marginals: Tensor | None, weights: Tensor | None, *rest) -> tuple[Tensor, Tensor, Tensor]:
    columns, none = (*scores.shape[:-2], scores.shape[-1]), scores.new_empty(0)
    by_marginals = none if marginals is None else scores.new_empty(columns)
    by_weights = scores.new_empty(0) if weights is None else scores.new_empty(scores.shape[:-1])
    return torch.empty_like(scores, memory_format=torch.contiguous_format), by_marginals, by_weights
