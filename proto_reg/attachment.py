"""The layer in a model whose source stays as it is: a forward hook on the submodule that returns the latents."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from ._checks import check_instance
from .regularizer import PrototypicalRegularizer, RegularizerOutput

Select = int | str | slice | None


def attach(
    model: nn.Module,
    encode: str | nn.Module,
    latent_dim: int,
    num_prototypes: int,
    *,
    name: str = "prototypes",
    select: Select = None,
    **options: Any,
) -> Attachment:
    """Regularise the latents of ``model`` without touching its source; ``model.prototypes`` is the layer.

    A forward hook passes what the submodule ``encode`` returns through a :class:`PrototypicalRegularizer`, which is now
    a submodule of ``model``: part of its parameters, its ``state_dict``, its copies and pickles. Attach before the
    optimizer is built, before DistributedDataParallel and before ``torch.compile``; for an optimizer that is there
    already, ``optimizer.add_param_group({"params": attachment.layer.parameters()})``. To load what was saved, build the
    model, attach, then ``load_state_dict``: the class alone, or ``from_pretrained``, does not know the layer.

    Every call of ``encode`` is a step of its own: called twice in a forward pass it counts two, and ``output`` and
    ``loss`` are those of the last. So is its second run in a backward pass, where ``torch.utils.checkpoint`` has it:
    checkpoint the blocks inside it instead.

    Args:
        model: the autoencoder; no nn.Sequential, which would run the layer as one more of its own.
        encode: the submodule whose output is the latent, or its name: ``"encoder"``, ``"encoder.mu"``.
        latent_dim, num_prototypes, options: of :class:`PrototypicalRegularizer`.
        name: the layer's name in ``model``.
        select: where in the output the latent is: the index in a tuple or list, the key in a mapping or the name of an
            attribute, or, for mu and log variance in one tensor, a slice of the axis d of the layout.

    Returns:
        The attachment; :meth:`Attachment.detach` takes everything back.

    Raises:
        TypeError, ValueError: an argument out of its range, named. The model is unchanged then.
    """
    target = _find(model, encode)
    if not isinstance(select, (int, str, slice, type(None))) or isinstance(select, bool):
        raise TypeError(
            f"select: expected an int, str or slice, got {type(select).__name__}. Leave it out for a tensor."
        )
    if isinstance(select, slice) and select.step not in (None, 1):
        raise ValueError(f"select: expected a slice without a step, got {select}. Choose neighbouring entries.")
    if not name.isidentifier() or hasattr(model, name):
        raise ValueError(f"name: expected a new attribute of the model, got {name!r}. Choose another, such as 'prior'.")
    layer = PrototypicalRegularizer(latent_dim, num_prototypes, **options)
    here = next(chain(target.parameters(), model.parameters()), None)
    layer.to(None if here is None else here.device).train(model.training)
    hook = _LatentHook(layer, select)
    hook.handle = target.register_forward_hook(hook)
    model.add_module(name, layer)
    return Attachment(model, name, hook)


class Attachment:
    """What :func:`attach` did to a model; as a context manager it takes that back at the end.

    Attributes:
        layer: the :class:`PrototypicalRegularizer`.
    """

    def __init__(self, model: nn.Module, name: str, hook: _LatentHook) -> None:
        self._model, self._name, self._hook = model, name, hook
        self.layer = hook.layer

    @classmethod
    def of(cls, model: nn.Module, name: str = "prototypes") -> Self:
        """The attachment in a copy of a model, or in one that was unpickled. ValueError if there is none."""
        layer = getattr(model, name, None)
        for hook in _hooks(model):
            if hook.layer is layer:
                return cls(model, name, hook)
        raise ValueError(f"name: expected a layer that attach() put into the model, got {name!r}. Attach one first.")

    @property
    def output(self) -> RegularizerOutput:
        """What the layer computed at the last forward pass. RuntimeError before the first."""
        if self._hook.output is None:
            raise RuntimeError(
                "output: expected a forward pass first, there was none. If there was, the model does not call the "
                "submodule itself (but its forward, say): attach to one that it calls."
            )
        return self._hook.output

    @property
    def loss(self) -> Tensor:
        """() the loss to add to your own in ``mode="weighted"``; nothing to do in ``"balanced"``."""
        return self.output.loss

    def detach(self) -> None:
        """Restore the model: hook and submodule are gone, the ``state_dict`` has the keys it had."""
        if self._hook.handle is not None:
            self._hook.handle.remove()
        if getattr(self._model, self._name, None) is self.layer:
            delattr(self._model, self._name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Attachment({self._name!r}, {self.layer})"


class _LatentHook:
    """Forward hook that knows its layer: a copy or pickle of the model carries both, and they stay together."""

    def __init__(self, layer: PrototypicalRegularizer, select: Select) -> None:
        self.layer, self.select = layer, select
        self.output: RegularizerOutput | None = None
        # Kept here for its pickled form, which reserves the hook's id in the process that unpickles it.
        self.handle: RemovableHandle | None = None

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        axis = self.layer.layout.latent_axis
        z, self.output = self.layer(_take(output, self.select, axis))
        return _put(output, self.select, axis, z)

    def __getstate__(self) -> dict:
        """Without the last output: it may hold a graph, which cannot be copied."""
        return self.__dict__ | {"output": None}


def _find(model: nn.Module, encode: str | nn.Module) -> nn.Module:
    """The submodule ``encode`` of ``model``, free of hooks of ours; TypeError or ValueError if that cannot be."""
    check_instance("model", model, nn.Module)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        raise ValueError(f"model: expected one that is not wrapped yet, got {type(model).__name__}. Attach, then wrap.")
    if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"model: expected a module with a forward of its own, got {type(model).__name__}, which would take the "
            "layer for one more of its members. Wrap it in a module: self.encoder, self.decoder = ..."
        )
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(encode, nn.Module):
        if not any(encode is module for module in model.modules()):
            raise ValueError(f"encode: expected a submodule of the model, got another module. Choose from {names}.")
        target = encode
    elif encode in names:
        target = model.get_submodule(encode)
    else:
        raise ValueError(f"encode: expected the name of a submodule, got {encode!r}. Choose from {names}.")
    if any(isinstance(hook, _LatentHook) for hook in target._forward_hooks.values()):
        raise ValueError(
            "encode: expected a submodule without a layer, got one with. Call detach() on the other first."
        )
    return target


def _hooks(model: nn.Module) -> list[_LatentHook]:
    hooks = chain.from_iterable(module._forward_hooks.values() for module in model.modules())
    return [hook for hook in hooks if isinstance(hook, _LatentHook)]


def _take(output: Any, select: Select, axis: int) -> Tensor:
    """The latent in ``output``. TypeError if it is not where ``select`` says."""
    found = output
    if isinstance(select, int) and isinstance(output, (tuple, list)) and -len(output) <= select < len(output):
        found = output[select]
    elif isinstance(select, str):
        found = output.get(select) if isinstance(output, Mapping) else getattr(output, select, None)
    elif isinstance(select, slice) and isinstance(output, Tensor):
        found = output[(slice(None),) * axis + (select,)]
    elif select is not None:
        found = None
    if not isinstance(found, Tensor):
        form = f" of {len(output)}" if isinstance(output, (tuple, list)) else ""
        keys = f" with {list(output)}" if isinstance(output, Mapping) else ""
        raise TypeError(
            f"encode: expected a submodule that returns the latent as a tensor (select={select!r}), got "
            f"{type(output).__name__}{form}{keys}. Say where the latent is, for example select=0 or select='embedding'."
        )
    return found


def _put(output: Any, select: Select, axis: int, z: Tensor) -> Any:
    """``output`` with ``z`` in the place of its latent; the object itself is not changed."""
    if select is None:
        return z
    if isinstance(select, slice):
        start, stop, _ = select.indices(output.shape[axis])
        before, after = output.narrow(axis, 0, start), output.narrow(axis, stop, output.shape[axis] - stop)
        return torch.cat([before, z, after], axis)
    if isinstance(select, int):
        entries = list(output)
        entries[select] = z
        return output._make(entries) if hasattr(output, "_make") else type(output)(entries)
    if dataclasses.is_dataclass(output) and not isinstance(output, (Mapping, type)):
        return dataclasses.replace(output, **{select: z})
    if hasattr(output, "_replace"):
        return output._replace(**{select: z})
    changed = copy.copy(output)
    if isinstance(output, Mapping):
        changed[select] = z
    else:
        setattr(changed, select, z)
    return changed
