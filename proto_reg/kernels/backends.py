"""Which code computes a call: plain torch, a compiled library or Triton. One set of checks chooses and explains.

A compiled backend bears the name of the device type that it computes on. Triton takes its place on a GPU without a
library. Nothing here runs at import: libraries are looked for when the first tensor comes, GPUs asked and Triton
imported only for a tensor that lies on one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .._checks import check_choice
from . import build

NAMES = ("auto", "torch", *build.BACKENDS, "triton")
DEVICES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # the backends of a type of device, the preferred one first
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SINKHORN = tuple(f"proto_reg::sinkhorn{rest}" for rest in ("", "_codes", "_out", "_cross_entropy"))
LAYER = ("anchored_mmd_loss", "balanced_step")
ROWS = ("unit_rows", "unit_rows_pull_back", "balance", "typical_sums", "tally_float32", "follow_float32", "attach")
OPERATORS = {
    "cpu": (
        *SINKHORN,
        *(f"proto_reg::{name}" for name in ("sinkhorn_counted", "sinkhorn_gradient", *LAYER, *ROWS)),
    ),
    "cuda": SINKHORN,
    "triton": (*SINKHORN, "proto_reg::sinkhorn_gradient"),
}

_chosen: dict[tuple[str, torch.device, torch.dtype], str] = {}
_loaded: dict[str, Path] = {}
_failed: dict[Path, str] = {}  # a library that did not load is not tried again
_triton: list[torch.library.Library] = []  # while Triton's kernels are registered
_lock = threading.RLock()


def choose(backend: str, scores: Tensor) -> str:
    """``"torch"``, ``"cpu"``, ``"cuda"`` or ``"triton"``: what computes this call. Loads it when it is first needed.

    Args:
        backend: one of ``NAMES``. For ``"auto"`` the environment's PROTO_REG_BACKEND counts, and without that what
            can run, silently. Any other choice is kept or raises.
        scores: the operator's scores; device and dtype count.

    Raises:
        ValueError: no such backend, or one that does not compute on this device or in this dtype.
        RuntimeError: its library is missing or does not load. Both name every reason, with its cure.
    """
    return _resolve(backend, scores.device, scores.dtype)


def _resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    # Every call of an operator comes through here: one look-up, no environment.
    return _chosen.get((backend, device, dtype)) or _decide(backend, device, dtype)


# What torch.compiler.assume_constant_result sets; calling it would import all of torch._dynamo. The graph holds the
# choice that was right when it was traced.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reasons(backend: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> list[str]:
    """Why ``backend`` cannot compute scores of this device and dtype (None: of any), each with its cure; [] if it can.

    Loads the library if nothing else is in the way.
    """
    if backend == "torch":
        return []
    with _lock:
        misfits = _misfits(backend, device, dtype)
        return misfits + _missing(backend, device, load=not misfits) or _trial(backend, device, dtype)


def loaded(backend: str) -> Path | None:
    """The library of ``backend`` that this process uses, or None."""
    return _loaded.get(backend)


def _decide(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    check_choice("backend", backend, NAMES)
    wanted, origin = (backend, "backend") if backend != "auto" else (_environment(), "PROTO_REG_BACKEND")
    if wanted == "auto":
        usable = (name for name in DEVICES.get(device.type, ()) if not reasons(name, device, dtype))
        chosen = next(usable, "torch")
    else:
        chosen = wanted
        if against := reasons(wanted, device, dtype):
            kind = ValueError if _misfits(wanted, device, dtype) else RuntimeError
            lines = "".join(f"\n  - {reason}" for reason in against)
            raise kind(
                f"{origin}: expected a backend that can compute {str(dtype).removeprefix('torch.')} scores on "
                f"{device}, got {wanted!r}, which cannot:{lines}\nOr use 'auto' for what can run."
            )
    if not (chosen in DEVICES["cuda"] and _capturing()):  # a capture leaves out the trial
        _chosen[backend, device, dtype] = chosen
    return chosen


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _environment() -> str:
    return check_choice("PROTO_REG_BACKEND", os.environ.get("PROTO_REG_BACKEND") or "auto", NAMES)


def _misfits(backend: str, device: torch.device | None, dtype: torch.dtype | None) -> list[str]:
    """What is wrong with the tensor, not with the library."""
    found = []
    place = next(place for place, names in DEVICES.items() if backend in names)
    if device is not None and device.type != place:
        where = ", where there is a GPU" if place == "cuda" else ""
        found.append(f"it computes on {place}, the scores are on {device}. Move them with scores.to({place!r}){where}.")
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        found.append(f"it computes {names}, the scores are {str(dtype).removeprefix('torch.')}. Use backend='torch'.")
    return found


def _missing(backend: str, device: torch.device | None, *, load: bool) -> list[str]:
    """What is wrong with the library; loads it, building it first where PROTO_REG_BUILD asks for that."""
    if backend in _loaded:
        return []
    if backend == "triton":
        return _missing_triton(load=load)
    on_gpu = device is not None and device.type == "cuda" == backend and torch.cuda.is_available()
    candidates = build.candidates(backend, torch.cuda.get_device_capability(device) if on_gpu else None)
    path = next((path for path, objection in candidates if objection is None), None)
    if path is None and load and os.environ.get("PROTO_REG_BUILD") in (backend, "all"):
        try:
            path = build.build(backend)
        except build.BuildError as error:
            # Asked for, so not silent; auto goes on with plain torch.
            warnings.warn(f"PROTO_REG_BUILD: {error}", stacklevel=2)
            return [str(error)]
    if path is None:
        found = [f"{path}: {objection}" for path, objection in candidates[:3]]
        found = found or [f"its library is neither in {build.PREBUILT} nor in {build.cache_directory()}."]
        in_the_way = build.obstacle(backend)
        if in_the_way is not None:
            return [*found, f"it cannot be built here: {in_the_way}"]
        return [*found, f"it is not built. Run python -m proto_reg build {backend}."]
    return _load(backend, path) if load else []


def _missing_triton(*, load: bool) -> list[str]:
    """What is in the way of Triton; registers its kernels."""
    if "cuda" in _loaded:
        return ["this process uses the CUDA library, which takes its place. Use backend='cuda'."]
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed. A torch for GPUs brings it; or pip install triton."]
    if not torch.cuda.is_available():
        return ["no GPU in sight: torch.cuda.is_available() is False."]
    if load:
        try:
            from . import sinkhorn_triton, sinkhorn_triton_gradient
        except Exception as error:  # a triton that does not fit this Python or torch may raise anything
            return [f"triton does not import: {error!r}. Install the version that fits this torch."]
        operators = {**sinkhorn_triton.OPERATORS, **sinkhorn_triton_gradient.OPERATORS}
        _triton.append(sinkhorn_triton.register(operators))
        _loaded["triton"] = Path(str(sinkhorn_triton.triton.__file__)).parent
        _chosen.clear()  # what plain torch did until now
    return []


def _unload_triton() -> None:
    while _triton:
        _triton.pop()._destroy()
    _loaded.pop("triton", None)


def _load(backend: str, path: Path) -> list[str]:
    if path not in _failed:
        if backend == "cuda":
            _unload_triton()
        try:
            torch.ops.load_library(path)
        except OSError as error:
            _failed[path] = f"{path} does not load: {error.__cause__ or error}. Delete it and build again."
        else:
            absent = [name for name in OPERATORS[backend] if not _registered(name, backend.upper())]
            if absent:
                _failed[path] = f"{path} loads, but registers no {', '.join(absent)}. Delete it and build again."
    if path in _failed:
        return [_failed[path]]
    _loaded[backend] = path
    _chosen.clear()  # what plain torch did until now
    return []


def _registered(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _trial(backend: str, device: torch.device | None, dtype: torch.dtype | None) -> list[str]:
    """A GPU may lack the driver or the machine code for a library that loads: two rows tell."""
    if backend not in DEVICES["cuda"] or device is None or not torch.cuda.is_available() or _capturing():
        return []
    try:
        scores = torch.zeros(2, 2, device=device, dtype=dtype)
        torch.ops.proto_reg.sinkhorn(scores, None, None, 1.0, 1, None, False)
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton compiles now, and may raise anything
        if backend == "cuda" and not isinstance(error, RuntimeError):
            raise
        cure = "Run python -m proto_reg build cuda with a toolkit that fits the driver."
        return [f"{_loaded[backend]} does not run on {torch.cuda.get_device_name(device)}: {error}. {cure}"]
    return []


def _reset() -> None:
    """Forget every choice and failure, and what the environment said: for tests."""
    _unload_triton()
    _chosen.clear()
    _loaded.clear()
    _failed.clear()
    _environment.cache_clear()
