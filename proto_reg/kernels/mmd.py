"""``proto_reg::anchored_mmd``, ``anchored_mmd_loss``, ``weighted_mmd``: schema, plain-torch reference, registration.

All return the statistic and its gradient from one pass. The backward pass keeps no kernel matrix, so the memory is
that of one slab of tiles. Gradients are first order only. ``anchored_mmd_loss`` has a compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from . import closed_forms
from .first_order import without_graph
from .mmd_pairs import pair_sums, per_row, sum_by_group, weighted_pair_sums

# Kernel and scales; whether the statistic is unbiased; whether a cluster weighs as many latents as it has.
Form: TypeAlias = tuple[str, list[float], bool, bool]


def anchored_mmd_reference(
    residuals: Tensor,
    groups: Tensor,
    num_groups: int,
    kernel: str,
    scales: list[float],
    unbiased: bool,
    samples: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Squared MMD between each group of residuals and N(0, I), and its gradient.

    Args:
        residuals: (N, D) float32 or float64, latents minus their anchors.
        groups: (N,) int64; values outside [0, num_groups) leave the row out.
        num_groups: K.
        kernel, scales: see ``closed_forms``.
        unbiased: U-statistic if True, V-statistic if False.
        samples: (N, D) draws of N(0, I), one for each row, for the sampled target; None for the analytic one.

    Returns:
        values: (K,) squared MMD; exactly 0 for groups of fewer than two rows.
        gradient: (N, D) of ``values[groups[i]]`` by ``residuals[i]``.
    """
    with torch.autocast(residuals.device.type, enabled=False):
        dim = residuals.shape[1]
        inside = (groups >= 0) & (groups < num_groups)
        slot = torch.where(inside, groups, num_groups)
        n = sum_by_group(inside.to(residuals.dtype), slot, num_groups)
        # Rows of groups with fewer than two members do not take part.
        inside = inside & (per_row(n, slot) > 1)
        slot = torch.where(inside, groups, num_groups)
        residuals = torch.where(inside[:, None], residuals, 0.0)
        alive = n > 1
        pairs = torch.where(alive, 1 / (n * (n - 1) if unbiased else n * n).clamp_min(1), 0.0)
        k0 = closed_forms.diagonal(kernel)

        if samples is None:
            total, gradient = pair_sums(residuals, inside.to(residuals.dtype), slot, num_groups, kernel, scales)
            a, slope = closed_forms.attraction(kernel, residuals.square().sum(1), dim, scales)
            values = total * pairs - 2 * sum_by_group(a, slot, num_groups) / n.clamp_min(1)
            values = values + closed_forms.self_term(kernel, dim, scales)
            values = values if unbiased else values + k0 / n.clamp_min(1)
            pull = 4 * slope / per_row(n, slot).clamp_min(1)
            gradient = gradient * per_row(pairs, slot)[:, None] - pull[:, None] * residuals
        else:
            both = torch.cat([residuals, samples])
            sign = torch.cat([torch.ones_like(a := inside.to(residuals.dtype)), -torch.ones_like(a)])
            total, gradient = pair_sums(both, sign, torch.cat([slot, slot]), num_groups, kernel, scales)
            gradient = gradient[: len(residuals)]
            if unbiased:
                # Without the pairs (r_i, y_i) this is the one-sample U-statistic of Gretton et al. (2012), eq. 4.
                difference = residuals - samples
                k, slope = closed_forms.pair(kernel, difference.square().sum(1), dim, scales)
                total = total + 2 * sum_by_group(k, slot, num_groups)
                gradient = gradient + 4 * slope[:, None] * difference
            else:
                total = total + 2 * k0 * n
            values = total * pairs
            gradient = gradient * per_row(pairs, slot)[:, None]
        return torch.where(alive, values, 0.0), torch.where(inside[:, None], gradient, 0.0)


def anchored_mmd_loss_reference(
    z: Tensor,
    anchors: Tensor,
    assignments: Tensor,
    mask: Tensor | None,
    scales: list[float],
    unbiased: bool,
    by_mass: bool,
    kernel: str = "gaussian",
    samples: Tensor | None = None,
    statistic: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over k of c_k times the squared MMD of cluster k, differentiable; and its gradient by ``z``, a constant.

    Args:
        z: (N, D) float32 or float64.
        anchors: (K, D).
        assignments: (N,) int64; values outside [0, K) leave the row out.
        mask: (N,) bool, True where a row counts.
        by_mass: c_k is the cluster's share of all rows that count; False: 1.
        scales, unbiased, kernel, samples: see :func:`anchored_mmd_reference`.
        statistic: that function; None: the operator around it, which autograd sees through.
    """
    inside = (assignments >= 0) & (assignments < len(anchors))
    inside = inside if mask is None else inside & mask
    index = torch.where(inside, assignments, 0)
    values, gradient = (statistic or torch.ops.proto_reg.anchored_mmd)(
        z - anchors[index], torch.where(inside, index, -1), len(anchors), kernel, scales, unbiased, samples
    )
    weights = torch.ones_like(values)
    if by_mass:
        counts = torch.zeros_like(values).index_add_(0, index, inside.to(values.dtype))
        weights = counts / inside.sum().clamp_min(1)
    return (values * weights).sum(), gradient * weights[index, None]


def anchored_mmd_loss_without_graph(*arguments) -> tuple[Tensor, Tensor]:
    """``proto_reg::anchored_mmd_loss`` without a graph."""
    return without_graph(torch.ops.proto_reg.anchored_mmd_loss.default, *arguments)


def weighted_mmd_reference(
    z: Tensor, anchors: Tensor, weights: Tensor, kernel: str, scales: list[float], unbiased: bool, by_mass: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over k of c_k MMD^2 between z weighted by column k of ``weights`` and N(v_k, I), with its gradients.

    The statistic is sum_{i != j} p_i p_j k_ij / (1 - sum p^2) - 2 sum_i p_i a_i + b (U) or the plain quadratic form
    (V). p is the column, normalised to sum 1. c_k is the column's share of all weight (``by_mass``) or 1. A column adds
    exactly 0 if it has no weight, or if one row has all of it.

    Args:
        z: (N, D) float32 or float64.
        anchors: (K, D).
        weights: (N, K), >= 0.

    Returns:
        loss (), gradient by z (N, D), gradient by the anchors (K, D).
    """
    with torch.autocast(z.device.type, enabled=False):
        dim = z.shape[1]
        mass = weights.sum(0)
        p = weights / mass.clamp_min(torch.finfo(z.dtype).tiny)
        spread = (p * (1 - p)).sum(0)  # 1 - sum p^2, without the cancellation
        alive = spread > torch.finfo(z.dtype).eps  # a cluster of less than two latents, up to rounding
        share = mass / mass.sum().clamp_min(torch.finfo(z.dtype).tiny) if by_mass else torch.ones_like(mass)
        share = torch.where(alive, share, 0.0)
        c = share / torch.where(alive, spread, 1.0) if unbiased else share

        # A common shift leaves distances as they are, and keeps float32 exact far from the origin.
        centre = anchors.mean(0)
        x, v = z - centre, anchors - centre
        loss, grad_z = weighted_pair_sums(x, p * c.sqrt(), kernel, scales)
        k0 = closed_forms.diagonal(kernel)
        loss = loss if unbiased else loss + k0 * (c * (1 - spread)).sum()

        squared = (x.square().sum(1, keepdim=True) + v.square().sum(1) - 2 * x @ v.T).clamp_min_(0)
        a, slope = closed_forms.attraction(kernel, squared, dim, scales)
        q = p * share
        loss = loss - 2 * (q * a).sum() + closed_forms.self_term(kernel, dim, scales) * share.sum()
        pull = 4 * q * slope
        grad_z = grad_z - (pull.sum(1, keepdim=True) * x - pull @ v)
        grad_anchors = pull.T @ x - pull.sum(0)[:, None] * v
        return loss, grad_z, grad_anchors


torch.library.define(
    "proto_reg::anchored_mmd",
    "(Tensor residuals, Tensor groups, SymInt num_groups, str kernel, float[] scales, bool unbiased, Tensor? samples)"
    " -> (Tensor values, Tensor gradient)",
)
torch.library.impl("proto_reg::anchored_mmd", "CompositeExplicitAutograd")(anchored_mmd_reference)
torch.library.define(
    "proto_reg::anchored_mmd_loss",
    "(Tensor z, Tensor anchors, Tensor assignments, Tensor? mask, float[] scales, bool unbiased, bool by_mass)"
    " -> (Tensor loss, Tensor gradient)",
)
torch.library.impl("proto_reg::anchored_mmd_loss", "CompositeExplicitAutograd")(
    torch.no_grad()(anchored_mmd_loss_reference)
)
torch.library.define(
    "proto_reg::weighted_mmd",
    "(Tensor z, Tensor anchors, Tensor weights, str kernel, float[] scales, bool unbiased, bool by_mass)"
    " -> (Tensor loss, Tensor grad_z, Tensor grad_anchors)",
)
torch.library.impl("proto_reg::weighted_mmd", "CompositeExplicitAutograd")(weighted_mmd_reference)


@torch.library.register_fake("proto_reg::anchored_mmd")
def _anchored_fake(residuals, groups, num_groups, kernel, scales, unbiased, samples):
    return residuals.new_empty((num_groups,)), torch.empty_like(residuals)


@torch.library.register_fake("proto_reg::anchored_mmd_loss")
def _loss_fake(z, anchors, assignments, mask, scales, unbiased, by_mass):
    return z.new_empty(()), torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.register_fake("proto_reg::weighted_mmd")
def _weighted_fake(z, anchors, weights, kernel, scales, unbiased, by_mass):
    return z.new_empty(()), torch.empty_like(z), torch.empty_like(anchors)


def _anchored_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[1], output[1])


def _anchored_backward(ctx, by_values, _):
    groups, gradient = ctx.saved_tensors
    inside = (groups >= 0) & (groups < len(by_values))
    upstream = per_row(by_values, torch.where(inside, groups, len(by_values)))
    return upstream[:, None] * gradient, None, None, None, None, None, None


def _loss_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[1], inputs[2], output[1])


def _loss_backward(ctx, by_loss, _):
    anchors, assignments, gradient = ctx.saved_tensors
    by_z, by_anchors = by_loss * gradient, None
    if ctx.needs_input_grad[1]:
        # Rows that are left out have a gradient of 0.
        inside = (assignments >= 0) & (assignments < len(anchors))
        by_anchors = torch.zeros_like(anchors).index_add_(0, torch.where(inside, assignments, 0), by_z, alpha=-1)
    return by_z, by_anchors, None, None, None, None, None


def _weighted_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _weighted_backward(ctx, by_loss, *_):
    grad_z, grad_anchors = ctx.saved_tensors
    return by_loss * grad_z, by_loss * grad_anchors, None, None, None, None, None


torch.library.register_autograd("proto_reg::anchored_mmd", _anchored_backward, setup_context=_anchored_context)
torch.library.register_autograd("proto_reg::anchored_mmd_loss", _loss_backward, setup_context=_loss_context)
torch.library.register_autograd("proto_reg::weighted_mmd", _weighted_backward, setup_context=_weighted_context)
