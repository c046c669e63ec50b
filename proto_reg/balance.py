"""The gradient of one loss, scaled to the size of another's that is known only in the backward pass."""

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
    "call the layer where no gradient is to be differentiated."
)


class AttachDirection(torch.autograd.Function):
    """Identity whose backward adds |g| times a direction known beforehand, and gives the head |g| times its steps.

    ``direction`` like z, or None to add nothing at all; ``counted`` bool, what of g its norm is taken of, or None for
    all; then the steps of the head's parameters, and those parameters. |g| is over all ranks of the group: one number
    is all-reduced in the backward pass, as in that of SyncBatchNorm.
    """

    @staticmethod
    def forward(
        ctx,
        group: ProcessGroup | None,
        z: Tensor,
        direction: Tensor | None,
        counted: Tensor | None,
        *steps_and_parameters: Tensor,
    ) -> Tensor:
        ctx.group = group
        steps = steps_and_parameters[: len(steps_and_parameters) // 2]
        ctx.save_for_backward(direction, counted, *steps)
        # Not a view, which could not be written to: decoders may begin with an in-place ReLU.
        return z.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        direction, counted, *steps = ctx.saved_tensors
        if direction is None:  # both weights are 0: not even an added zero, and prototypes without a gradient
            return None, gradient, None, None, *([None] * 2 * len(steps))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            direction = Once.apply(direction, gradient, ONCE)
        if ctx.group is None and counted is None and len(steps) == 1 and gradient.dtype == direction.dtype:
            by_z, by_parameter = attach(gradient, direction, *steps)
            return None, by_z, None, None, None, by_parameter
        # In the direction's float32: the norm of a half-precision gradient under loss scaling overflows its dtype.
        wide = gradient.to(direction.dtype)
        (norm,) = norms([wide if counted is None else torch.where(counted, wide, 0.0)], ctx.group)
        by_z = gradient + (norm * direction).to(gradient.dtype)
        return None, by_z, None, None, *([None] * len(steps)), *(norm * step for step in steps)


def is_of_leaf(z: Tensor) -> bool:
    """Whether ``z`` is a leaf that requires a gradient, or a view of one: torch lets nobody write to it in place.

    A graph that is traced cannot tell: True.
    """
    if torch.compiler.is_compiling() or not z.requires_grad:
        return z.requires_grad
    return z.is_leaf or (z._base is not None and z._base.is_leaf)


def norms(gradients: list[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """|gradient| of each, over its rows on all ranks."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    if group is None:
        return norms
    # In float64: squares of small gradients underflow float32.
    squares = sum_(torch.stack(norms).double().square(), group)
    return list(squares.sqrt().to(norms[0].dtype).unbind())


def add_up(
    a: Tensor, b: Tensor, weight_a: float, weight_b: float, group: ProcessGroup | None, shares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """weight_a a / |a| + weight_b b / |b| of rows (N, D), norms over those of all ranks; and weight_a / |a|, ().

    ``shares`` () or (2,): shares of their usual size that the weights have; None: all of it.
    """
    if group is None and shares is None:
        return balance(a, b, weight_a, weight_b)
    return add_at_weights(a, b, norms([a, b], group), weight_a, weight_b, shares)
