"""Values whose derivative is known beforehand, for what may be differentiated once, under ``torch.func`` too."""

from __future__ import annotations

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
        return by_value * _Once.apply(slope, x), None, None


class _Once(torch.autograd.Function):
    """The slope, which knows that it depends on x, but not how."""

    @staticmethod
    def forward(slope: Tensor, x: Tensor) -> Tensor:
        return slope.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, by_slope: Tensor):
        raise RuntimeError("anchored_mmd: expected to be differentiated once, got a second derivative. It has none.")
