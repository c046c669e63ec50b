"""Values with known first derivatives. They work under ``torch.func`` too; a second derivative raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def transforming() -> bool:
    """Whether a ``torch.func`` transform is at work. It goes through plain torch, but not through our operators."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def with_slopes(name: str, value: Tensor, tensors: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    """``value`` (), whose derivatives by ``tensors`` are the constants ``slopes``, each like its tensor.

    A second derivative raises; ``name`` is what the message calls the value.
    """
    return _WithSlopes.apply(name, value, *tensors, *slopes)


class _WithSlopes(torch.autograd.Function):
    @staticmethod
    def forward(name: str, value: Tensor, *tensors_and_slopes: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.name = inputs[0]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, by_value: Tensor):
        saved = ctx.saved_tensors  # which checkpoints hand out once
        half = len(saved) // 2
        tensors, slopes = saved[:half], saved[half:]
        message = f"{ctx.name}: expected to be differentiated once, got a second derivative. It has none."
        once = (Once.apply(slope, x, message) for x, slope in zip(tensors, slopes, strict=True))
        by_tensors = ((by_value * slope).to(x.dtype) for x, slope in zip(tensors, once, strict=True))
        return None, None, *by_tensors, *([None] * half)


class Once(torch.autograd.Function):
    """The ``slope``, whose own derivative by ``x`` is not known: asked for it, autograd raises ``message``."""

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
    """What ``operator`` returns, without a graph.

    The call skips the code that ``register_autograd`` set up: it is Python and takes longer than a small problem.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
