"""Modules whose state must not be rounded to half precision."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from typing_extensions import Self


class WideState(nn.Module):
    """A module whose buffers keep their precision under ``.half()`` and ``.bfloat16()``. Devices change as usual."""

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            # From the value before: rounded and widened again, it would have lost digits.
            if buffer is not None and after is not None and after.dtype.itemsize < buffer.dtype.itemsize:
                self._buffers[name] = after.to(buffer.dtype) if buffer.is_meta else buffer.to(after.device)
        return self


class Record(WideState):
    """A record of what was seen: buffers that begin as zeros."""

    def reset_parameters(self) -> None:
        """Zero the buffers. After ``to_empty`` from the meta device they hold anything."""
        for buffer in self._buffers.values():
            if buffer is not None:
                buffer.zero_()
