"""State that counts and averages, and so cannot do with half precision."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from typing_extensions import Self


class WideState(nn.Module):
    """A module whose buffers stay as wide as they are under ``.half()`` and ``.bfloat16()``; devices move as ever."""

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            # From the value before: rounded to half precision and widened again, it would have lost its digits.
            if buffer is not None and after is not None and after.dtype.itemsize < buffer.dtype.itemsize:
                self._buffers[name] = after.to(buffer.dtype) if buffer.is_meta else buffer.to(after.device)
        return self


class Record(WideState):
    """What was seen so far: buffers that begin as zeros."""

    def reset_parameters(self) -> None:
        """Forget it, and whatever memory held where the module came from the meta device by ``to_empty``."""
        for buffer in self._buffers.values():
            if buffer is not None:
                buffer.zero_()
