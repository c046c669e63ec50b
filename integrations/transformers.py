"""Hugging Face transformers (extra ``transformers``): prototypes under an unmodified Trainer."""

from __future__ import annotations

from typing import Any

from proto_reg import PrototypicalRegularizer, attach

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "proto_reg.integrations.transformers needs transformers and accelerate. Run: pip install "
        "'proto_reg[transformers]'"
    ) from error


class PrototypeTrainerCallback(TrainerCallback):
    """Adds prototypes to a model, and logs their metrics after each epoch.

    ::

        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.add_callback(PrototypeTrainerCallback(trainer, "encoder", latent_dim=32, num_prototypes=30))
        trainer.train()

    The layer is attached at once, so the Trainer's optimizer, checkpoints and ``resume_from_checkpoint`` have it.
    Metrics go through ``trainer.log``, so they reach ``state.log_history`` and every reporter.

    Args:
        trainer: before its first ``train()``.
        encode: name of the submodule whose output is the latent. None if the model has a layer of its own, for example
            from ``model_init``; then its metrics are logged and nothing else is done.
        options: of :func:`proto_reg.attach`: ``latent_dim``, ``num_prototypes``, ``name``, ``select``, ``layout``, ...

    Raises:
        TypeError, ValueError: a trainer whose model or optimizer comes from elsewhere, ``mode="weighted"``, or what
            :func:`proto_reg.attach` raises.
    """

    def __init__(self, trainer: Trainer, encode: str | None = None, **options: Any) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer: expected a Trainer, got {type(trainer).__name__}. Build the Trainer first.")
        self.trainer = trainer
        if encode is not None:
            self._check(trainer, options)
            attach(trainer.model, encode, **options)
        elif trainer.model_init is None and not self._layers():
            raise ValueError("encode: expected the name of a submodule, or a model with a layer. Got neither.")

    @staticmethod
    def _check(trainer: Trainer, options: dict[str, Any]) -> None:
        if trainer.model_init is not None:
            raise ValueError(
                "trainer: expected a model, got model_init, which builds another one in train(). Call proto_reg.attach "
                "in model_init, and PrototypeTrainerCallback(trainer) without encode."
            )
        if trainer.optimizer is not None:
            raise ValueError(
                "trainer: expected one without an optimizer yet, got one with. Call proto_reg.attach before you build "
                "the optimizer, and PrototypeTrainerCallback(trainer) without encode."
            )
        if options.get("mode", "balanced") != "balanced":
            raise ValueError(
                f"mode: expected 'balanced', got {options['mode']!r}: a callback cannot add to your loss. Put the "
                "layer into the model, add info.loss there, and use PrototypeTrainerCallback(trainer) without encode."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the layers the length of the training."""
        for layer in self._layers().values():
            layer.expect(state.max_steps * args.gradient_accumulation_steps)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting anew, unless a run is resumed within an epoch."""
        if float(state.epoch or 0).is_integer():
            for layer in self._layers().values():
                layer.reset_metrics()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the epoch's metrics."""
        wanted = control.should_log
        layers = self._layers().items()
        self.trainer.log({f"{name}/{key}": value for name, layer in layers for key, value in layer.metrics().items()})
        control.should_log = wanted  # the Trainer's own log is still to come

    def _layers(self) -> dict[str, PrototypicalRegularizer]:
        """The layers in the model. A single one has its own name, several have their paths."""
        modules = self.trainer.model.named_modules()
        found = {name: module for name, module in modules if isinstance(module, PrototypicalRegularizer)}
        return {name.rpartition(".")[2]: m for name, m in found.items()} if len(found) == 1 else found
