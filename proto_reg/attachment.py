"""Puts the layer into a model whose source stays as it is, by a forward hook on the submodule that encodes."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
import weakref
from collections.abc import Mapping
from itertools import chain
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from ._checks import check_instance, warn
from .kernels.first_order import transforming
from .output import RegularizerOutput
from .regularizer import PrototypicalRegularizer

Select = int | str | slice | None
# Classes that save and load the layer too, for libraries that build their models anew.
VARIATIONAL = re.compile(r"VAE|AutoencoderKL|log_?var|log_?sigma|log_?std|var_encoder|fc_var", re.IGNORECASE)
OURS = {"diffusers": "diffusers.PrototypicalAutoencoder", "scvi": "scvi.PrototypicalSCVI"}


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

    A forward hook passes the output of the submodule ``encode`` through a :class:`PrototypicalRegularizer`. The layer
    lives in that submodule (in the last module of an nn.Sequential). So it is part of the submodule's and the model's
    parameters, ``state_dict``, copies and pickles. An optimizer of ``model.encoder.parameters()`` alone knows it.

    Attach before you build the optimizer, before DistributedDataParallel and before ``torch.compile``. If the optimizer
    is there already, call ``optimizer.add_param_group({"params": attachment.layer.parameters()})``. To load a
    checkpoint, build the model, attach, then call ``load_state_dict``. A class that builds itself (``from_pretrained``,
    scvi's ``load``) knows the layer only if it attaches in its ``__init__``.

    Under PEFT attach first, and name the layer in ``modules_to_save=["prototypes"]``. Then it is trained and saved with
    the adapter, and ``attachment.layer`` is the one at work.

    The model keeps its noise and its KL term, which pulls all prototypes to one point: set the term's weight to 0. On
    MNIST the test error is .0164 with both and .0072 without, and control .55 and .97 (docs/how-it-works.md). If the
    model looks like a VAE, a warning says so.

    Every call of ``encode`` is a step of its own. If a forward pass calls it twice, it counts two, and ``output`` and
    ``loss`` belong to the last call. A second run by ``torch.utils.checkpoint`` in the backward pass is not a step.

    Args:
        model: the autoencoder.
        encode: the submodule whose output is the latent, or its name: ``"encoder"``, ``"encoder.mu"``.
        latent_dim, num_prototypes, options: of :class:`PrototypicalRegularizer`.
        name: the layer's name in ``model``, and in the submodule.
        select: where the latent is in the output: an index of a tuple or list, a key of a mapping, or the name of an
            attribute. For mu and log variance in one tensor: a slice of the layout's axis d.

    Returns:
        The attachment; :meth:`Attachment.detach` takes everything back.

    Raises:
        TypeError, ValueError: an argument out of its range, named. The model is unchanged then.
    """
    target, path = _find(model, encode)
    if not isinstance(select, (int, str, slice, type(None))) or isinstance(select, bool):
        raise TypeError(
            f"select: expected an int, str or slice, got {type(select).__name__}. Leave it out for a tensor."
        )
    if isinstance(select, slice) and select.step not in (None, 1):
        raise ValueError(f"select: expected a slice without a step, got {select}. Choose neighbouring entries.")
    owner = _owner(target)
    if not name.isidentifier() or hasattr(model, name) or hasattr(owner, name):
        raise ValueError(
            f"name: expected a new attribute of the model and of {path or 'itself'!r}, got {name!r}. Choose another, "
            "such as 'prior'."
        )
    layer = PrototypicalRegularizer(latent_dim, num_prototypes, **options)
    here = next(chain(target.parameters(), model.parameters()), None)
    layer.to(None if here is None else here.device).train(model.training)
    owner.add_module(name, layer)
    model.__dict__[name] = layer  # plain access: the layer is registered once, in its owner
    hook = _LatentHook(model, path, owner, name, select)
    hook.handle = target.register_forward_hook(hook)
    _say_what_stays(model)
    return Attachment(model, hook)


class Attachment:
    """What :func:`attach` did to a model. As a context manager it takes that back at the end."""

    def __init__(self, model: nn.Module, hook: _LatentHook) -> None:
        self._model, self._hook = model, hook

    @classmethod
    def of(cls, model: nn.Module, name: str = "prototypes") -> Self:
        """The attachment in a copied or unpickled model. ValueError if there is none."""
        hooks = [hook for hook in _hooks(model) if hook.name == name]
        if len(hooks) > 1:
            layer = getattr(model, name, None)
            hooks = [hook for hook in hooks if hook.layer is layer]
        if len(hooks) != 1:
            raise ValueError(
                f"name: expected a layer that attach() put into the model, got {name!r}. Attach one first."
            )
        return cls(model, hooks[0])

    @property
    def layer(self) -> PrototypicalRegularizer:
        """The layer at work, or what a wrapper such as PEFT's put in its place."""
        return self._hook.layer

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
        """() the loss to add to your own in ``mode="weighted"``. In ``"balanced"`` there is nothing to add."""
        return self.output.loss

    def detach(self) -> None:
        """Restore the model: hook and layer are gone, and the ``state_dict`` has its old keys."""
        hook = self._hook
        if hook.handle is not None:
            hook.handle.remove()
        if hook.name in hook.owner._modules:
            delattr(hook.owner, hook.name)
        self._model.__dict__.pop(hook.name, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Attachment({self._hook.name!r}, {self.layer})"


class _LatentHook:
    """Forward hook that looks its layer up by name, so that a wrapper may replace it.

    The owner is the submodule or lies inside it. So a copy or pickle of the submodule carries all of it.
    """

    def __init__(self, model: nn.Module, path: str, owner: nn.Module, name: str, select: Select) -> None:
        self.owner, self.name, self.select = owner, name, select
        self.output: RegularizerOutput | None = None
        # Kept here for its pickled form, which reserves the hook's id in the process that unpickles it.
        self.handle: RemovableHandle | None = None
        self.model: weakref.ref[nn.Module] | None = weakref.ref(model)  # None once it was looked at
        self.path = path

    @property
    def layer(self) -> PrototypicalRegularizer:
        return getattr(self.owner, self.name)

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        layer = self.layer
        axis = layer.layout.latent_axis
        latent = _take(output, self.select, axis)
        if self.model is not None:
            self._look_at(self.model(), module)
        z, self.output = layer(latent)
        return _put(output, self.select, axis, z)

    def _look_at(self, model: nn.Module | None, module: nn.Module) -> None:
        """ValueError if an adapter was put around ``module`` after the layer was attached."""
        if torch.compiler.is_compiling() or transforming():
            return
        if model is not None and _is_wrapped(model, self.path, module):
            raise ValueError(
                f"encode: expected {self.path!r} as it was, got it inside an adapter, which adds to the latent behind "
                "the layer. Attach to a submodule around it, or leave it out of the adapter's target_modules."
            )
        self.model = None

    def __getstate__(self) -> dict:
        """The state without the last output, whose graph cannot be copied, and without the model."""
        return self.__dict__ | {"output": None, "model": None}


def _find(model: nn.Module, encode: str | nn.Module) -> tuple[nn.Module, str]:
    """The submodule ``encode`` of ``model`` and its name; TypeError or ValueError if no layer can go there."""
    check_instance("model", model, nn.Module)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        raise ValueError(f"model: expected one that is not wrapped yet, got {type(model).__name__}. Attach, then wrap.")
    modules = dict(model.named_modules())
    names = [name for name in modules if name]
    if isinstance(encode, nn.Module):
        path = next((name for name, module in modules.items() if module is encode), None)
        if path is None:
            raise ValueError(f"encode: expected a submodule of the model, got another module. Choose from {names}.")
    elif encode in names:
        path = encode
    elif callable(getattr(model, str(encode), None)):
        raise ValueError(
            f"encode: expected the name of a submodule, got {encode!r}, which is a method of {type(model).__name__}. A "
            f"hook sees submodules only: name the one whose output the method returns, of {names}."
        )
    else:
        raise ValueError(f"encode: expected the name of a submodule, got {encode!r}. Choose from {names}.")
    target = modules[path]
    if isinstance(target, (nn.ModuleList, nn.ModuleDict)) or (isinstance(target, nn.Sequential) and not len(target)):
        raise ValueError(
            f"encode: expected a submodule that computes the latent, got {target}. Choose the one that the model calls."
        )
    if any(isinstance(hook, _LatentHook) for hook in target._forward_hooks.values()):
        raise ValueError(
            "encode: expected a submodule without a layer, got one with. Call detach() on the other first."
        )
    return target, path


def _owner(target: nn.Module) -> nn.Module:
    """The module that the layer lives in: ``target``, or the last module of an nn.Sequential, which calls its own."""
    while isinstance(target, nn.Sequential) and len(target):
        target = target[-1]
    return target


def _hooks(model: nn.Module) -> list[_LatentHook]:
    hooks = chain.from_iterable(module._forward_hooks.values() for module in model.modules())
    return [hook for hook in hooks if isinstance(hook, _LatentHook)]


def _is_wrapped(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether what is now at ``path`` is one of PEFT's adapters around ``module``."""
    try:
        return getattr(model.get_submodule(path), "base_layer", None) is module
    except AttributeError:
        return False


def _say_what_stays(model: nn.Module) -> None:
    """Warn of a KL term and of a library that builds ``model`` anew, unless it attaches in its own ``__init__``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__" and any(value is model for value in frame.f_locals.values()):
            return
        frame = frame.f_back
    if VARIATIONAL.search(" ".join([type(model).__name__, *(name for name, _ in model.named_modules())])):
        warn(
            f"attach leaves the model's KL term and noise as they are, and {type(model).__name__} looks like a VAE. "
            "The KL term pulls all prototypes to one point: on MNIST the test error is .0164 with both, .0072 without. "
            "Set the term's weight to 0 if your loss has one."
        )
    libraries = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if not hasattr(model, "from_pretrained") and "scvi" not in libraries:
        return
    builder = "scvi's load" if "scvi" in libraries else f"{type(model).__name__}.from_pretrained"
    ours = next((f", or use proto_reg.integrations.{OURS[name]}" for name in libraries if name in OURS), "")
    warn(
        f"{builder} builds the model without the layer, and the layer's weights that were saved do not come back. "
        f"Attach in the model's __init__, or attach again and load a state_dict of your own{ours}."
    )


def _take(output: Any, select: Select, axis: int) -> Tensor:
    """The latent in ``output``. TypeError if it is not where ``select`` says."""
    if isinstance(output, tuple) and any(isinstance(entry, RegularizerOutput) for entry in output):
        raise TypeError(
            "encode: expected a submodule that calls its members by name, got one that calls every child, and so the "
            "layer too. Attach to a submodule around it or inside it."
        )
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
    """``output`` with ``z`` in the place of its latent. The object itself stays as it is."""
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
