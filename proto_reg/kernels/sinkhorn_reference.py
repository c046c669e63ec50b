"""Balanced assignment in plain torch. It judges every compiled kernel, and runs if there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import compute_dtype
from .first_order import transforming
from .sinkhorn_log import balance_logits
from .sinkhorn_scaling import SAFE_RANGE, SMALL, exact_products, scale, scale_groups, scale_plans


def sinkhorn_reference(
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
    with_potentials: bool = True,
) -> tuple[Tensor, Any]:
    """Balanced codes and column potentials, for every finite score in every float dtype.

    It starts from f = 0 and repeats ``num_iters`` times ``g_k = log r_k - logsumexp_i(log w_i + S_ik / eps + f_i)`` and
    ``f_i = -log W - logsumexp_k(S_ik / eps + g_k)``; the codes are ``W exp(S / eps + f + g)``, W the sum of weights.

    Args:
        scores: (B, K) or (G, B, K), any float dtype; G separate problems.
        marginals: (K,) or (G, K) target column masses r, or None for 1/K each.
        weights: (B,) or (G, B) w >= 0: a row of weight 2 counts as two; a row of weight 0 gets codes too.
        epsilon: entropic regularisation, > 0, in units of the scores.
        num_iters: iterations (at most, with ``tol``).
        tol: stop once every column is within this relative error of its marginal.
        isolate: rows that hold a NaN, a +inf or nothing but -inf count as absent and get NaN codes. Scores in columns
            of marginal 0 do not matter for this.
        with_potentials: False may return None in their place.

    Returns:
        codes: like ``scores``, rows sum to 1.
        potentials: (K,) or (G, K) g, so that ``softmax(S / eps + g)`` assigns new rows by the same balance.
    """
    x, weights, usable = usable_rows(scores, marginals, weights, isolate)
    codes, potentials = _solve(x, marginals, weights, epsilon, num_iters, tol, with_potentials)
    codes = isolated(codes, usable)
    return codes if codes.dtype == scores.dtype else codes.to(scores.dtype), potentials


def sinkhorn_cross_entropy_reference(
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
    temperature: float,
    with_codes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of softmax(S / tau) against the codes of :func:`sinkhorn_reference` (paper, eq. 10), and its slope.

    Returns:
        loss: () ``-(1/W) sum_i w_i sum_k q_ik log p_ik``, p = softmax(S / tau).
        gradient: (B, K) by the scores, codes held fixed: ``w_i (p - q) / (tau W)``.
        potentials: (K,)
        codes: (B, K), or (0, K) unless ``with_codes``.

    Autograd and ``torch.func`` can differentiate the loss. The codes are constants.
    """
    x, weights, usable = usable_rows(scores, marginals, weights, isolate)
    codes, potentials = _solve(x.detach(), marginals, weights, epsilon, num_iters, tol)
    targets = codes
    if weights is not None and torch.is_grad_enabled():
        # Left out later, a NaN would reach the gradient.
        x, targets = (torch.where(weights[:, None] > 0, rows, 0.0) for rows in (x, codes))
    loss, gradient = cross_entropy_of_rows(x, targets, temperature)
    if weights is None:
        loss, gradient = loss.mean(), gradient / scores.shape[0]  # len() would fix the size in a torch.export
    else:
        share = (weights / torch.where(weights.sum() > 0, weights.sum(), 1.0)).to(x.dtype)
        loss = torch.where(share > 0, share * loss, 0.0).sum()
        gradient = torch.where(share[:, None] > 0, share[:, None] * gradient, 0.0)
    codes = isolated(codes, usable)
    codes = codes.to(scores.dtype) if with_codes else scores.new_empty((0, scores.shape[1]))
    return loss, gradient.to(scores.dtype), potentials, codes


def cross_entropy_of_rows(x: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """-sum_k q_k log softmax_k(x / tau) of each row (B,), and its gradient by ``x`` (B, K)."""
    log_p = log_probabilities(x, temperature)
    return cross_entropies(log_p, codes), away_from_codes(log_p.exp(), codes) / temperature


def log_probabilities(x: Tensor, temperature: float) -> Tensor:
    """log softmax(x / tau) of each row (B, K), for scores of any size."""
    return ((x - x.detach().amax(1, keepdim=True)) / temperature).log_softmax(1)


def cross_entropies(log_p: Tensor, codes: Tensor) -> Tensor:
    """-sum_k q_k log p_k of each row (B,). A prototype with q = 0 adds 0, even if p is 0."""
    return -(codes * torch.where(codes == 0, 0.0, log_p)).sum(1)


def away_from_codes(p: Tensor, codes: Tensor) -> Tensor:
    """p - q for predictions and codes (B, K). With a single prototype it is exactly 0."""
    return p - codes if codes.shape[1] > 1 else 0 * codes


def usable_rows(
    scores: Tensor, marginals: Tensor | None, weights: Tensor | None, isolate: bool, *, or_absent: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scores in the dtype of the computation, weights without the rows to isolate, and which rows remain.

    ``or_absent``: also leave out rows that hold a NaN and have no weight. Otherwise every gradient would be NaN.
    """
    dtype = compute_dtype(scores.dtype)
    x = scores if scores.dtype == dtype else scores.to(dtype)
    absent = or_absent and weights is not None
    if not isolate and not absent:
        return x, weights, None
    possible = x > -torch.inf
    if marginals is not None:
        possible = possible & (marginals > 0).unsqueeze(-2)
    usable = ~(x.isnan() | (x == torch.inf)).any(-1) & possible.any(-1)
    if weights is None:
        weights = usable.to(torch.float32)
    elif isolate:
        weights = torch.where(usable, weights, 0.0)
    else:
        usable = usable | (weights > 0)
    return torch.where(usable[..., None], x, 0.0), weights, usable


def isolated(codes: Tensor, usable: Tensor | None) -> Tensor:
    """``codes`` (..., B, K) with NaN in the rows that are not ``usable`` (..., B); None: all are."""
    return codes if usable is None else torch.where(usable[..., None], codes, torch.nan)


def _solve(
    x: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    with_potentials: bool = True,
) -> tuple[Tensor, Any]:
    """Codes and potentials in the dtype of ``x``, by the fastest way that is safe for these scores."""
    marginals = normalised(marginals, x)
    if x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling():  # fakes hold no number
        # Here two numbers are read at no cost. Elsewhere control flow must not wait for the device.
        if x.ndim == 3:
            reference, low = x.amax(-1, keepdim=True), x.amin()
            high = reference.amax(-2, keepdim=True)
        elif x.numel() < SMALL:
            low, high = x.aminmax()
            reference = high
        else:  # one for each row: two more operations, and small exponents where errors of many rows add up
            reference = x.amax(1, keepdim=True)
            low, high = x.amin(), reference.amax()
        narrow = float(high.amax()) - float(low) < SAFE_RANGE * epsilon and 1e-30 < epsilon < 1e30
        if narrow and (weights is None or bool(weights.any(-1).all())) and exact_products():
            if x.ndim == 2:
                return scale(x, reference, high, marginals, weights, epsilon, num_iters, tol, with_potentials)
            if tol is None:  # groups settle one by one
                return scale_groups(x, reference, high, marginals, weights, epsilon, num_iters)
    if tol is None and not transforming():
        return scale_plans(x, marginals, weights, epsilon, num_iters, with_potentials)
    return balance_logits(x, marginals, weights, epsilon, num_iters, tol)


def normalised(marginals: Tensor | None, x: Tensor) -> Tensor | None:
    """Marginals in the dtype of ``x``, summing to 1."""
    if marginals is None:
        return None
    marginals = marginals.to(x)
    return marginals / marginals.sum(-1, keepdim=True)
