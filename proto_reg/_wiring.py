"""Looks at how a layer is wired in its first training steps, and warns of quiet mistakes by the third."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._checks import warn

ENOUGH = 10  # calls after which nobody looks any more
STEPS = 2  # optimizer steps that show a mistake: the third call then tells
MANY = 2048  # a look takes at most this many nodes of a graph, prototypes, or entries of a parameter


class Wiring:
    """Watches the first calls of one layer in training mode, and the steps of the optimizer that trains its encoder.

    Args:
        said: what the layer was warned of; a warning is given once.
    """

    def __init__(self, said: set[str]) -> None:
        self.said = said
        self.calls = self.arrived = self.loss_arrived = self.optimizer_steps = 0
        self.unanswered: set[int] = set()  # calls whose gradient has not come back
        self.overtaken: set[int] = set()  # those among them that another call followed
        self.evaluations: int | None = 0  # gradients through calls in eval mode; None once it was in training mode
        self.encoder: weakref.ref[nn.Parameter] | None = None
        self.version = 0  # of that parameter at the first call
        self.upstream: set[int] = set()  # ids of the parameters before the layer, if they may include a decoder's
        self.in_optimizer = self.decoded = False
        self._handle: Any = None

    @property
    def open(self) -> bool:
        """Whether it still looks."""
        return self.calls < ENOUGH

    def say(self, key: str, message: str) -> None:
        """Warn with ``message``, once."""
        if key not in self.said:
            self.said.add(key)
            warn(message)

    def watch(self, latents: Tensor, z: Tensor, loss: Tensor, head: nn.Module, balanced: bool) -> Tensor:
        """Look at a training call that returns ``z``. Returns its ``loss``, which in balanced mode knows a mistake."""
        self.evaluations = None
        self.calls += 1
        if self.calls == 1:
            self._begin(latents, head)
        self._judge(balanced)
        if not self.open:
            self._end()
        self.overtaken |= self.unanswered
        if not balanced:
            if loss.requires_grad:
                loss.register_hook(self._loss_arrived)
            return loss
        if z.requires_grad:
            self.unanswered.add(self.calls)
            z.register_hook(_once_for(self, self.calls))
        only_shown = loss.as_subclass(OnlyShown)
        only_shown.wiring = self
        return only_shown

    def watch_evaluation(self, z: Tensor, trained: Callable[[], bool]) -> None:
        """Look at a call in eval mode with gradients enabled. ``trained``: whether the layer has been trained."""
        if self.evaluations is None or not z.requires_grad or self.evaluations > STEPS:
            return

        def arrived(gradient: Tensor) -> None:
            if self.evaluations is not None:
                self.evaluations += 1
                if self.evaluations > STEPS and not trained():
                    self.say(
                        "eval",
                        f"{self.evaluations} backward passes have gone through a layer in eval() that was never "
                        "trained: it does nothing there. Call model.train() before you train.",
                    )

        z.register_hook(arrived)

    def _begin(self, latents: Tensor, head: nn.Module) -> None:
        """Remember what the latents come from, and look at optimizers from now on."""
        parameters, complete = parameters_behind(latents)
        if not parameters:  # a frozen encoder
            return
        self.encoder, self.version = weakref.ref(parameters[0]), parameters[0]._version
        narrow = any(p.ndim == 2 and 1 < p.shape[0] < latents.shape[1] for p in parameters)  # a latent of its own
        self.upstream = {id(parameter) for parameter in parameters} if complete and narrow else set()
        here, owned = weakref.ref(self), {id(p) for p in head.parameters() if p.is_leaf and p.requires_grad}

        def stepped(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            wiring = here()
            if wiring is not None:
                wiring._stepped(optimizer, owned)

        self._handle = register_optimizer_step_post_hook(stepped)
        weakref.finalize(self, self._handle.remove)

    def _end(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _stepped(self, optimizer: Optimizer, owned: set[int]) -> None:
        """An optimizer has stepped: does it know the encoder, the prototypes, and parameters behind the layer?"""
        groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.in_optimizer |= not owned or any(id(parameter) in owned for parameter in groups)
        learning = {id(parameter) for parameter in groups if parameter.grad is not None}
        self.decoded |= not self.upstream or bool(learning - self.upstream - owned)
        encoder = None if self.encoder is None else self.encoder()
        self.optimizer_steps += any(parameter is encoder for parameter in groups)

    def _judge(self, balanced: bool) -> None:
        """Warn of what the calls and steps so far show."""
        stepped = self.optimizer_steps >= STEPS
        if balanced and self.arrived == 0 and (stepped or (not self.open and self._moved())):
            self.say(
                "decoded",
                f"No gradient has come back to the latents in {self.calls - 1} training steps: neither the encoder nor "
                "the prototypes learn from the layer. Decode the z that it returns, without detach() or rounding: "
                "z, info = layer(encoder(x)), then decoder(z).",
            )
        elif stepped and balanced and not self.decoded:
            self.say(
                "behind",
                "No parameter behind the layer learns, and one before it has fewer outputs than its latents have "
                "dimensions: the layer seems to stand behind the decoder. Put it between encoder and decoder.",
            )
        if stepped and not balanced and self.loss_arrived == 0:
            self.say(
                "weighted",
                f"info.loss has had no gradient in {self.calls - 1} training steps: in mode='weighted' the layer acts "
                "by its loss alone. Add info.loss to your loss, or leave out mode=.",
            )
        if stepped and not self.in_optimizer:
            self.say(
                "optimizer",
                "The optimizer of the encoder does not have the layer's parameters: prototypes do not learn. Build it "
                "after the layer, from model.parameters(), or call "
                "optimizer.add_param_group({'params': layer.parameters()}).",
            )

    def _moved(self) -> bool:
        """Whether something other than one of torch's optimizers trains the encoder."""
        encoder = None if self.encoder is None else self.encoder()
        return encoder is not None and encoder._version > self.version

    def _arrived(self, call: int) -> None:
        """The gradient of a ``call`` has come back."""
        self.arrived += 1
        self.unanswered.discard(call)
        if call in self.overtaken:
            self.say(
                "twice",
                "The layer was called twice before one backward pass: each call is a step of its own, with its own "
                "balance, count and pull. Call it once, on torch.cat of both batches.",
            )

    def _loss_arrived(self, gradient: Tensor) -> None:
        self.loss_arrived += 1


def _once_for(wiring: Wiring, call: int) -> Callable[[Tensor], None]:
    here = weakref.ref(wiring)
    seen: list[int] = []

    def arrived(gradient: Tensor) -> None:
        found = here()
        if found is not None and not seen:
            seen.append(call)
            found._arrived(call)

    return arrived


class OnlyShown(Tensor):
    """``info.loss`` of a balanced layer in its first steps. Whoever adds it to a loss with a gradient is told.

    A product is of this class too: a weight in front hides nothing. All other results are plain tensors.
    """

    wiring: Wiring

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call ``func``, and warn if it adds to a tensor with a gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        shown = next((value for value in args if isinstance(value, OnlyShown)), None)
        wiring = getattr(shown, "wiring", None)
        if wiring is not None and name in ("mul", "rmul", "div", "truediv") and isinstance(result, Tensor):
            result = result.as_subclass(cls)
            result.wiring = wiring
        elif wiring is not None and name in ("add", "radd", "iadd") and result.requires_grad:
            wiring.say(
                "balanced",
                "info.loss was added to a loss: in mode='balanced' it has no gradient, and the layer acts without it. "
                "Leave it out, or build the layer with mode='weighted'.",
            )
        return result


def parameters_behind(z: Tensor) -> tuple[list[nn.Parameter], bool]:
    """The parameters that ``z`` is computed from, the nearest first, and whether these are all.

    A graph of more than ``MANY`` nodes is not walked to its end.
    """
    if isinstance(z, nn.Parameter):
        return [z], True
    waiting: list[Any] = [z.grad_fn]
    seen: set[Any] = set()
    found: list[nn.Parameter] = []
    for node in waiting:  # it grows
        if node is None or node in seen:
            continue
        if len(seen) == MANY:
            return found, False
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a leaf's node
        if isinstance(variable, nn.Parameter):
            found.append(variable)
        waiting.extend(before for before, _ in node.next_functions)
    return found, True
