"""Algorithm 1 of the paper on isolated steps, and the mixin that gives it to a trainer class."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ._checks import PrototypeWarning, check_choice, check_positive_int
from .regularizer import PrototypicalRegularizer

SCHEDULES = ("paper", "balanced")


def isolated_step(loss: Tensor, parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> bool:
    """One step of ``optimizer`` on ``loss`` that leaves every ``.grad`` as it was.

    Gradients are averaged over the process group, if there is one. The step is skipped if a gradient is not finite; as
    in ``torch.amp.GradScaler`` the test takes one read from the device.

    Returns:
        Whether the step was taken. Without a parameter that requires a gradient it is not.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters and loss.requires_grad else ()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for gradient in gradients:
            if gradient is not None:
                torch.distributed.all_reduce(gradient)
                gradient.div_(torch.distributed.get_world_size())
    finite = [gradient.isfinite().all() for gradient in gradients if gradient is not None]
    if not finite or not bool(torch.stack(finite).all()):
        return False
    kept = [parameter.grad for parameter in parameters]
    try:
        _set_gradients(parameters, gradients)
        optimizer.step()
    finally:
        _set_gradients(parameters, kept)
    return True


def _distinct(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Each parameter once: tied weights are one parameter in two modules."""
    return list(dict.fromkeys(parameters))


def _set_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


class PrototypicalTraining(nn.Module):
    """Algorithm 1: warm-up epochs of reconstruction, then three isolated steps a batch, or one balanced step.

    With ``schedule="paper"`` each batch after warm-up takes three steps: a prototype step (encoder and prototypes), an
    MMD step (encoder, prototypes fixed) and a reconstruction step (encoder and decoder). Each has its own optimizer and
    forward pass; only the last moves batch-norm statistics. ``schedule="balanced"`` takes one step on everything, with
    the layer in balanced mode. Neither touches a ``.grad`` that others use.

    It is a module. Its ``state_dict`` holds encoder, decoder, regularizer, the optimizers' state and the epoch, and
    loads with ``weights_only=True``. A sampled target draws from torch's random state: save that too, and a run resumes
    bit for bit.

    Args:
        encoder: returns latents in the regularizer's layout.
        decoder: takes latents.
        regularizer: the layer. The schedule ``"paper"`` uses its losses without weights and schedule; see
            :meth:`PrototypicalRegularizer.paper`.
        reconstruction: (decoder output, x) -> scalar; binary cross-entropy with logits by default (paper, eq. 2).
        warmup_epochs: epochs of reconstruction only (paper: 10).
        schedule: ``"paper"`` or ``"balanced"``.
        optimizer: parameters -> optimizer; Adam at 1e-3 by default, as in the paper.
        encode: x -> latents, if the encoder's call does not return them (a VAE returns mu and logvar).

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """

    _encode: Callable[[Tensor], Tensor] | None

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        regularizer: PrototypicalRegularizer,
        *,
        reconstruction: Callable[[Tensor, Tensor], Tensor] = F.binary_cross_entropy_with_logits,
        warmup_epochs: int = 10,
        schedule: str = "paper",
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("encoder", encoder), ("decoder", decoder), ("regularizer", regularizer)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}. Wrap it in one.")
        self.encoder, self.decoder, self.regularizer = encoder, decoder, regularizer
        self.reconstruction = reconstruction
        # Not registered: a module that encodes is part of the encoder already.
        object.__setattr__(self, "_encode", encode)
        self.warmup_epochs = check_positive_int("warmup_epochs", warmup_epochs, minimum=0)
        self.schedule = check_choice("schedule", schedule, SCHEDULES)
        self.epoch = 0
        self.skipped_steps = 0
        encoding, decoding = list(encoder.parameters()), list(decoder.parameters())
        prototypes = list(regularizer.parameters())
        self._parameters_of = {
            "prototype": _distinct(encoding + prototypes),
            "mmd": encoding,
            "reconstruction": _distinct(encoding + decoding),
            "balanced": _distinct(encoding + decoding + prototypes),
        }
        steps = ("prototype", "mmd", "reconstruction") if schedule == "paper" else ("balanced",)
        self.last_step = steps[-1]
        build = optimizer or partial(torch.optim.Adam, lr=1e-3)
        self.optimizers = {step: build(self._parameters_of[step]) for step in steps}

    def encode(self, x: Tensor) -> Tensor:
        """Latents of ``x``."""
        return self.encoder(x) if self._encode is None else self._encode(x)

    @property
    def warming_up(self) -> bool:
        """Whether this epoch is one of reconstruction only."""
        return self.epoch < self.warmup_epochs

    def step(self, x: Tensor) -> dict[str, Tensor]:
        """Train on one batch and return its losses, detached: ``reconstruction`` and, after warm-up, the other two."""
        losses = self.regularizing_steps(x)
        loss, parts = self.loss(x)
        self._take(self.last_step, loss)
        return losses | parts

    def regularizing_steps(self, x: Tensor) -> dict[str, Tensor]:
        """Take the paper's prototype step and MMD step on one batch. Warm-up and the balanced schedule have none."""
        losses: dict[str, Tensor] = {}
        if self.schedule == "balanced" or self.warming_up:
            return losses
        with frozen_batch_statistics(self.encoder):
            for name in ("prototype", "mmd"):
                # Count once a batch, so that the next batch gets a new subsample.
                output = self.regularizer.losses(self.encode(x), count=name == "mmd")
                losses[name] = self._take(name, getattr(output, f"{name}_loss"))
        return losses

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the last step of a batch, for ``optimizers[last_step]``, and its parts, detached."""
        z = self.encode(x)
        if self.schedule == "paper" or self.warming_up:
            reconstruction = self.reconstruction(self.decoder(z), x)
            return reconstruction, {"reconstruction": reconstruction.detach()}
        z, info = self.regularizer(z)
        reconstruction = self.reconstruction(self.decoder(z), x)
        parts = {"prototype": info.prototype_loss, "mmd": info.mmd_loss, "reconstruction": reconstruction}
        loss = reconstruction if self.regularizer.mode == "balanced" else reconstruction + info.loss
        return loss, {name: part.detach() for name, part in parts.items()}

    def end_epoch(self) -> None:
        """Count an epoch. :meth:`fit` calls this."""
        self.epoch += 1

    def fit(self, batches: Iterable, epochs: int) -> list[dict[str, float]]:
        """Train until ``epochs`` epochs are done in all. A resumed run ends at the same epoch.

        Args:
            batches: iterated once an epoch; each item is x, or a tuple or list whose first entry is x.

        Returns:
            The mean losses of each epoch that was run.
        """
        check_positive_int("epochs", epochs)
        if self.warmup_epochs >= epochs:
            warnings.warn(
                f"warmup_epochs = {self.warmup_epochs} covers all {epochs} epochs: nothing will be regularised. "
                "Shorten the warm-up.",
                PrototypeWarning,
                stacklevel=2,
            )
        history = []
        while self.epoch < epochs:
            losses = [self.step(item[0] if isinstance(item, (tuple, list)) else item) for item in batches]
            if not losses:
                raise ValueError(
                    "batches: expected at least one batch, got none. A generator is used up after an epoch."
                )
            history.append({key: torch.stack([row[key] for row in losses]).mean().item() for key in losses[0]})
            self.end_epoch()
        return history

    def _take(self, name: str, loss: Tensor) -> Tensor:
        self.skipped_steps += not isolated_step(loss, self._parameters_of[name], self.optimizers[name])
        return loss.detach()

    def get_extra_state(self) -> dict:
        """Optimizers and counters, so that ``state_dict`` has everything."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {"optimizers": optimizers, "epoch": self.epoch, "skipped_steps": self.skipped_steps}

    def set_extra_state(self, state: dict) -> None:
        """Counterpart of :meth:`get_extra_state`. Raises ValueError for the state of another schedule."""
        if set(state["optimizers"]) != set(self.optimizers):
            raise ValueError(
                f"state: expected the optimizers {sorted(self.optimizers)}, got {sorted(state['optimizers'])}. "
                "Resume with the schedule that was saved."
            )
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.epoch, self.skipped_steps = state["epoch"], state["skipped_steps"]


class PrototypicalTrainerMixin:
    """Gives your own trainer class the whole of Algorithm 1.

    Write ``class MyTrainer(PrototypicalTrainerMixin, Anything)``, in any order. Call :meth:`init_prototypical` once and
    :meth:`prototypical_step` for each batch; nothing happens by itself. All state is in
    ``self.prototypical.state_dict()``. A trainer that is a ``torch.nn.Module`` has it in its own, too.
    """

    prototypical: PrototypicalTraining

    def init_prototypical(
        self, encoder: nn.Module, decoder: nn.Module, regularizer: PrototypicalRegularizer, **options
    ) -> None:
        """Build ``self.prototypical``; arguments and errors are those of :class:`PrototypicalTraining`."""
        self.prototypical = PrototypicalTraining(encoder, decoder, regularizer, **options)

    def prototypical_step(self, x: Tensor) -> dict[str, Tensor]:
        """Train on one batch; see :meth:`PrototypicalTraining.step`."""
        return self._prototypical().step(x)

    def prototypical_end_epoch(self) -> None:
        """Count an epoch, so that warm-up ends."""
        self._prototypical().end_epoch()

    def prototypical_fit(self, batches: Iterable, epochs: int) -> list[dict[str, float]]:
        """Train for ``epochs`` epochs in all; see :meth:`PrototypicalTraining.fit`."""
        return self._prototypical().fit(batches, epochs)

    def _prototypical(self) -> PrototypicalTraining:
        if not hasattr(self, "prototypical"):
            raise RuntimeError(
                f"{type(self).__name__}.prototypical: expected to be built, is missing. Call "
                "self.init_prototypical(encoder, decoder, regularizer) first."
            )
        return self.prototypical


@contextmanager
def frozen_batch_statistics(module: nn.Module) -> Iterator[None]:
    """Inside this context the batch and instance norms of ``module`` keep their running statistics."""
    norms = nn.modules.batchnorm._NormBase
    layers = [m for m in module.modules() if isinstance(m, norms) and m.training and m.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
