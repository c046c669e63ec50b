"""Adds gradients that are known beforehand to one that arrives in the backward pass, at sizes relative to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._distributed import sum_
from .kernels.first_order import Once
from .kernels.layer_ops import add_at_weights, attach, balance

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ONCE = (
    "PrototypicalRegularizer: expected one derivative through mode='balanced', got a second. Use mode='weighted', or "
    "call the layer outside of what is differentiated twice."
)


class AttachDirection(torch.autograd.Function):
    """The identity. Its backward pass adds |g| times a direction to g, and gives the head |g| times its steps.

    Inputs: ``direction``, like z, or None to add nothing at all; ``mask``, bool, the entries of g whose norm is |g|, or
    None for all; the steps of the head's parameters; those parameters. |g| is over all processes of the group: the
    backward pass all-reduces one number, as that of SyncBatchNorm does.
    """

    @staticmethod
    def forward(
        ctx,
        group: ProcessGroup | None,
        z: Tensor,
        direction: Tensor | None,
        mask: Tensor | None,
        *steps_and_parameters: Tensor,
    ) -> Tensor:
        ctx.group = group
        steps = steps_and_parameters[: len(steps_and_parameters) // 2]
        ctx.save_for_backward(direction, mask, *steps)
        # No view: torch forbids writes to one, and decoders may begin with an in-place ReLU.
        return z.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        direction, mask, *steps = ctx.saved_tensors
        if direction is None:  # both weights are 0: nothing is added, and prototypes get no gradient
            return None, gradient, None, None, *([None] * 2 * len(steps))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            direction = Once.apply(direction, gradient, ONCE)
        if ctx.group is None and mask is None and len(steps) == 1 and gradient.dtype == direction.dtype:
            by_z, by_parameter = attach(gradient, direction, *steps)
            return None, by_z, None, None, None, by_parameter
        # In float32, as the direction: under loss scaling the norm of a half-precision gradient overflows.
        wide = gradient.to(direction.dtype)
        (norm,) = norms([wide if mask is None else torch.where(mask, wide, 0.0)], ctx.group)
        by_z = gradient + (norm * direction).to(gradient.dtype)
        return None, by_z, None, None, *([None] * len(steps)), *(norm * step for step in steps)


def is_of_leaf(z: Tensor) -> bool:
    """Whether ``z`` is a leaf that requires a gradient, or a view of one. Torch lets nobody write to it in place.

    While a graph is traced nobody knows: True.
    """
    if torch.compiler.is_compiling() or not z.requires_grad:
        return z.requires_grad
    return z.is_leaf or (z._base is not None and z._base.is_leaf)


def norms(gradients: list[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """The norms of ``gradients``, over the rows of all processes."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    if group is None:
        return norms
    # In float64: squares of small gradients underflow float32.
    squares = sum_(torch.stack(norms).double().square(), group)
    return list(squares.sqrt().to(norms[0].dtype).unbind())


def add_up(
    a: Tensor, b: Tensor, weight_a: float, weight_b: float, group: ProcessGroup | None, shares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``weight_a a / |a| + weight_b b / |b|`` (N, D) and ``weight_a / |a|`` (), norms over the rows of all processes.

    ``shares``: (2,) shares of their full size that the weights have; None for 1.
    """
    if group is None and shares is None:
        return balance(a, b, weight_a, weight_b)
    return add_at_weights(a, b, norms([a, b], group), weight_a, weight_b, shares)
