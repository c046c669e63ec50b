"""The gradient of one loss, scaled to the size of another's that is known only in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor


class AttachDirection(torch.autograd.Function):
    """Identity whose backward adds |g| times a direction known beforehand, and gives the head |g| times its steps.

    ``direction`` like z, or None to add nothing at all; ``counted`` bool, what of g its norm is taken of, or None for
    all; then the steps of the head's parameters, and those parameters.
    """

    @staticmethod
    def forward(
        ctx, z: Tensor, direction: Tensor | None, counted: Tensor | None, *steps_and_parameters: Tensor
    ) -> Tensor:
        steps = steps_and_parameters[: len(steps_and_parameters) // 2]
        ctx.save_for_backward(direction, counted, *steps)
        # Not a view, which could not be written to: decoders may begin with an in-place ReLU.
        return z.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        direction, counted, *steps = ctx.saved_tensors
        if direction is None:  # both weights are 0: not even an added zero, and prototypes without a gradient
            return gradient, None, None, *([None] * 2 * len(steps))
        # In the direction's float32: the norm of a half-precision gradient under loss scaling overflows its dtype.
        wide = gradient.to(direction.dtype)
        norm = torch.linalg.vector_norm(wide if counted is None else torch.where(counted, wide, 0.0))
        by_z = gradient + (norm * direction).to(gradient.dtype)
        return by_z, None, None, *([None] * len(steps)), *(norm * step for step in steps)


def inverse_norm(gradient: Tensor) -> Tensor:
    """1 / |gradient|, and 0 for a gradient of 0."""
    norm = torch.linalg.vector_norm(gradient)
    return torch.where(norm > 0, 1 / norm, 0.0)
