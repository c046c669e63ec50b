"""Hugging Face accelerate: your loop stays as it is; the layer's metrics need one line an epoch.

Build the layer into the model, or :func:`proto_reg.attach` it, before ``accelerator.prepare``. Gradients, accumulation,
mixed precision, ``save_state`` and ``load_state`` then work as before: the layer's state is part of the model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from proto_reg import PrototypicalRegularizer

if TYPE_CHECKING:
    from accelerate import Accelerator


def log_metrics(accelerator: Accelerator, model: nn.Module, step: int | None = None) -> dict[str, float]:
    """Log the metrics of every layer in ``model``, prepared or not, to the trackers. Then counting starts anew.

    Call it on every process, at the end of an epoch.

    Returns:
        ``{"prototypes/perplexity": ..., ...}``. The part before the slash is the layer's name, or its path if there are
        several.
    """
    values, modules = {}, accelerator.unwrap_model(model).named_modules()
    layers = {name: module for name, module in modules if isinstance(module, PrototypicalRegularizer)}
    for path, layer in layers.items():
        name = path.rpartition(".")[2] if len(layers) == 1 else path
        values |= {f"{name}/{key}": value for key, value in layer.metrics().items()}
        layer.reset_metrics()
    accelerator.log(values, step)
    return values
