"""Lets a forward pass that ``torch.utils.checkpoint`` runs again see the same state, and count once.

A checkpoint does not keep what autograd saves. It runs its function again when the backward pass asks for it. A layer
must not count again then. And it must see the state of its first run, or it computes something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

T = TypeVar("T")
Hooks: TypeAlias = tuple[Callable, Callable]
Buffers: TypeAlias = Sequence[tuple[nn.Module, str]]


def saving_hooks() -> Hooks | None:
    """The hooks that pack and unpack what autograd saves, such as a checkpoint's; None while a graph is traced."""
    return None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)


class Calls:
    """The state that each call in one checkpoint found, and how many calls a backward pass has run again."""

    def __init__(self) -> None:
        self.found: list[list[Tensor]] = []
        self.backward, self.again = -1, 0

    def next(self, backward: int) -> list[Tensor]:
        """The state for the call that runs again now, in the ``backward`` pass of that number."""
        if self.backward != backward:
            self.backward, self.again = backward, 0
        self.again += 1
        return self.found[(self.again - 1) % len(self.found)]


class Replay:
    """Keeps the buffers that each forward pass found while its checkpoint lasts. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._calls: WeakKeyDictionary[object, Calls] = WeakKeyDictionary()
        self._last: list[Tensor] | None = None

    def __reduce__(self) -> tuple:
        return Replay, ()

    def run(
        self, function: Callable[..., T], buffers: Callable[[], Buffers] | None, counting: bool, *arguments: Any
    ) -> T:
        """Call ``function(counting, *arguments)``.

        If a checkpoint runs it again, it counts nothing and finds ``buffers`` as they were in its first run.
        ``buffers``: what the function both reads and changes; None for nothing.
        """
        hooks = None if buffers is None else saving_hooks()
        if hooks is None or buffers is None:
            return function(counting, *arguments)
        before, present = self._before(hooks), buffers()
        if before is None:
            self._keep(hooks, [getattr(module, name).clone() for module, name in present])
            return function(counting, *arguments)
        now = [getattr(module, name) for module, name in present]
        _put(present, before)
        try:
            return function(False, *arguments)
        finally:
            _put(present, now)

    def _before(self, hooks: Hooks) -> list[Tensor] | None:
        backward = torch._C._current_graph_task_id()  # -1 outside a backward pass
        if backward == -1 or self._last is None:
            return None
        calls = self._calls.get(_checkpoint(hooks))
        # An inner checkpoint of one that runs again has no record of its own.
        return self._last if calls is None else calls.next(backward)

    def _keep(self, hooks: Hooks, found: list[Tensor]) -> None:
        self._last = found
        checkpoint = _checkpoint(hooks)
        if checkpoint is not None:
            self._calls.setdefault(checkpoint, Calls()).found.append(found)


def _put(buffers: Buffers, values: Sequence[Tensor]) -> None:
    for (module, name), value in zip(buffers, values, strict=True):
        module._buffers[name] = value


def _checkpoint(hooks: Hooks) -> object | None:
    """Torch's own record of the checkpoint that set ``hooks``. It is the same in both runs; None for other hooks."""
    pack = inspect.unwrap(hooks[0])
    seen = inspect.getclosurevars(pack).nonlocals if inspect.isfunction(pack) else {}
    again = seen.get("target_frame_ref")  # weak, in the hooks of the second run
    return seen.get("frame") if again is None else again()
