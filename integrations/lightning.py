"""PyTorch Lightning (extra ``lightning``): a callback that adds prototypes, and a mixin for the paper's Algorithm 1."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from proto_reg import PrototypeWarning, PrototypicalRegularizer, PrototypicalTrainerMixin, attach

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "proto_reg.integrations.lightning needs Lightning. Run: pip install 'proto_reg[lightning]'"
    ) from error


class PrototypeCallback(Callback):
    """Adds prototypes to a LightningModule: ``Trainer(callbacks=[PrototypeCallback(...)])``.

    It attaches the layer before the optimizers are built, in every stage. Then the layer is part of the module and of
    its checkpoints. Optimisation stays automatic; clipping, accumulation, precision and strategy stay yours. After each
    epoch it logs the layer's metrics as ``prototypes/...``. With ``decode`` it also draws the prototypes.

    To use a checkpoint without a Trainer, attach and then load::

        module = MyModule()
        proto_reg.attach(module, "encoder", latent_dim=32, num_prototypes=30)
        module.load_state_dict(torch.load(path)["state_dict"])

    Args:
        encode: name of the submodule whose output is the latent: ``"encoder"``, ``"vae.encoder"``. The layer lives
            there, so an optimizer of its parameters alone knows it. None if the module has a layer of its own, which is
            then only logged and drawn.
        decode: latents (n, D) -> images in [0, 1]: a function, or the name of a method or submodule of the module.
        image_shape: (C, H, W), if ``decode`` returns flat images.
        every_n_epochs: number of epochs between pictures.
        folder: for pictures; ``prototypes`` in the trainer's root by default. A logger that takes pictures gets them
            instead (``experiment.add_figure`` like TensorBoard, ``log_image`` like W&B).
        options: of :func:`proto_reg.attach`: ``latent_dim``, ``num_prototypes``, ``name``, ``select``, ``layout``, ...

    Raises:
        ValueError: ``mode="weighted"``. When the trainer sets up, :func:`proto_reg.attach` may raise, too.
    """

    def __init__(
        self,
        encode: str | None = None,
        *,
        decode: str | Callable[[Tensor], Tensor] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        every_n_epochs: int = 1,
        folder: str | Path | None = None,
        **options: Any,
    ) -> None:
        if options.get("mode", "balanced") != "balanced":
            raise ValueError(
                f"mode: expected 'balanced', got {options['mode']!r}: a callback cannot add to your loss. Call "
                "proto_reg.attach in the module's __init__, add attachment.loss, and use PrototypeCallback()."
            )
        self.encode, self.options = encode, options
        self.decode, self.image_shape, self.every_n_epochs, self.folder = decode, image_shape, every_n_epochs, folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the layer unless it is there. This runs before ``configure_optimizers`` and before loading."""
        if self.encode is None:
            if not _layers(pl_module):
                raise ValueError("encode: expected the name of a submodule, or a module with a layer. Got neither.")
            return
        if not isinstance(getattr(pl_module, self.options.get("name", "prototypes"), None), PrototypicalRegularizer):
            attach(pl_module, self.encode, **self.options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the layers the length of the training, if it has one."""
        total = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        for layer in _layers(pl_module).values() if 0 < total < math.inf else ():
            layer.expect(int(total))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's metrics, start counting anew, and draw the prototypes."""
        for name, layer in _layers(pl_module).items():
            pl_module.log_dict({f"{name}/{key}": value for key, value in layer.metrics().items()})
            layer.reset_metrics()
        if self.decode is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        from proto_reg import plots

        decode = attrgetter(self.decode)(pl_module) if isinstance(self.decode, str) else self.decode
        name, layer = next(iter(_layers(pl_module).items()))
        # It has its own generator, so pictures do not change the training's random numbers.
        generator = torch.Generator(layer.head.prototypes.device).manual_seed(0)
        try:
            with _evaluating(pl_module):
                figure = plots.prototypes(decode, layer.head, image_shape=self.image_shape, generator=generator)
        except (TypeError, ValueError) as error:  # a picture must not end a training
            self.decode = None
            warnings.warn(f"decode: no pictures of the prototypes: {error}", PrototypeWarning, stacklevel=2)
            return
        taken = False
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_figure"):
                logger.experiment.add_figure(name, figure, trainer.global_step)
            elif hasattr(logger, "log_image"):
                logger.log_image(name, [figure])
            else:
                continue
            taken = True
        if self.folder is not None or not taken:
            folder = Path(trainer.default_root_dir) / "prototypes" if self.folder is None else Path(self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}-{trainer.current_epoch:04d}.png")


class PrototypicalModuleMixin(PrototypicalTrainerMixin):
    """The paper's Algorithm 1 in a LightningModule: ``class Paper(PrototypicalModuleMixin, LightningModule)``.

    Call ``self.init_prototypical(encoder, decoder, layer, warmup_epochs=...)`` in ``__init__``. There is nothing else
    to write. ``training_step`` takes the prototype step and the MMD step as isolated steps. Lightning takes the
    reconstruction step, by automatic optimisation. So ``global_step`` counts a batch once, and clipping and
    accumulation act on the reconstruction step. Checkpoints hold all three optimizers. Warm-up counts the trainer's
    epochs.
    """

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Take both regularising steps on the batch or its first entry; returns the loss of the reconstruction."""
        training = self._prototypical()
        training.epoch = self.current_epoch
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        losses = training.regularizing_steps(x)
        loss, parts = training.loss(x)
        self.log_dict({f"train/{name}": value for name, value in (losses | parts).items()})
        # The steps above move prototypes. DistributedDataParallel wants them in this graph too, with gradient 0.
        return loss + 0.0 * torch.stack([p.sum() for p in training.regularizer.parameters()]).sum()

    def configure_optimizers(self) -> Optimizer:
        """The optimizer of the reconstruction step, or of the one step of ``schedule="balanced"``."""
        training = self._prototypical()
        return training.optimizers[training.last_step]

    def on_fit_start(self) -> None:
        """Move the state of the other two optimizers to the module's device."""
        training, epochs = self._prototypical(), self.trainer.max_epochs
        for optimizer in training.optimizers.values():
            optimizer.load_state_dict(optimizer.state_dict())
        if epochs is not None and 0 < epochs <= training.warmup_epochs:
            warnings.warn(
                f"warmup_epochs = {training.warmup_epochs} covers all {epochs} epochs: nothing will be regularised. "
                "Shorten the warm-up.",
                PrototypeWarning,
                stacklevel=2,
            )


def _layers(module: nn.Module) -> dict[str, PrototypicalRegularizer]:
    """The layers in ``module``. A single one has its own name, several have their paths."""
    found = {name: m for name, m in module.named_modules() if isinstance(m, PrototypicalRegularizer)}
    return {name.rpartition(".")[2]: m for name, m in found.items()} if len(found) == 1 else found


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Inside this context every submodule is in eval mode; afterwards each is as before."""
    training = [m for m in module.modules() if m.training]
    try:
        module.eval()
        yield
    finally:
        for m in training:
            m.training = True
