"""Values whose derivative is known beforehand, for what may be differentiated once, under ``torch.func`` too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def transforming() -> bool:
    """Whether a ``torch.func`` transform is at work: it goes through plain torch, but not through our operators."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class WithSlope(torch.autograd.Function):
    """``value`` (), whose derivative by ``x`` is the constant ``slope`` like x."""

    @staticmethod
    def forward(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, _, slope = inputs
        ctx.save_for_backward(x, slope)

    @staticmethod
    def backward(ctx, by_value: Tensor):
        x, slope = ctx.saved_tensors
        message = "anchored_mmd: expected to be differentiated once, got a second derivative. It has none."
        return by_value * Once.apply(slope, x, message), None, None


class Once(torch.autograd.Function):
    """The ``slope``, which knows that it depends on ``x``, but not how: asked for that, it raises ``message``."""

    @staticmethod
    def forward(slope: Tensor, x: Tensor, message: str) -> Tensor:
        return slope.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.message = inputs[-1]

    @staticmethod
    def backward(ctx, by_slope: Tensor):
        raise RuntimeError(ctx.message)


def without_graph(operator: Callable, *arguments):
    """What ``operator`` returns, differentiable in nothing, past what ``register_autograd`` set up for it.

    That is in Python and takes longer than a small problem.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
