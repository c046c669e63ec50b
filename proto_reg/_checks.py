"""Argument checks. Each message names the argument, what was expected, what came, and the cure."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of latents and scores


class PrototypeWarning(UserWarning):
    """Training goes on, but something is likely not as intended."""


def warn(message: str) -> None:
    """Give a :class:`PrototypeWarning` that points to the user's own line."""
    warnings.warn(message, PrototypeWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The ``stacklevel``, in :func:`warn`, of the first frame outside this package and torch."""
    inside = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``; ValueError otherwise."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}. Pick one of these.")
    return value


def check_positive_int(name: str, value: int, *, minimum: int = 1) -> int:
    """Return ``value`` if it is an int >= ``minimum`` (bool is no int here)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int >= {minimum}, got {type(value).__name__} ({value!r}). Pass an int.")
    if value < minimum:
        raise ValueError(f"{name}: expected an int >= {minimum}, got {value}. Pass a larger one.")
    return value


def check_number(name: str, value: float, *, above: float | None = None, at_least: float | None = None) -> float:
    """Return ``value`` as a finite float within its bound."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} ({value!r}). Pass a Python float.")
    bound = f" > {above:g}" if above is not None else f" >= {at_least:g}" if at_least is not None else ""
    too_low = (above is not None and not value > above) or (at_least is not None and not value >= at_least)
    if too_low or not -math.inf < value < math.inf:  # math.isfinite does not take traced numbers
        raise ValueError(f"{name}: expected a finite number{bound}, got {value}. Choose a value in that range.")
    return float(value)


def check_instance(name: str, value: object, kind: type[T]) -> T:
    """Return ``value`` if it is a ``kind``; TypeError otherwise."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(
            f"{name}: expected {article} {kind.__name__}, got {type(value).__name__}. Pass {kind.__name__}(...), or "
            "one derived from it."
        )
    return value


def check_head(value: object) -> None:
    """TypeError unless ``value`` has prototypes."""
    if not hasattr(value, "prototypes"):
        cure = "Pass its .head" if hasattr(value, "head") else "Pass a layer's .head"
        raise TypeError(f"head: expected a PrototypeHead, got {type(value).__name__}. {cure}.")


def check_floating(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a floating-point tensor."""
    if not isinstance(value, Tensor):
        cure = "Wrap it with torch.as_tensor"
        if isinstance(value, tuple):
            cure = f"Pass the entry that it is, such as {name}[0]"
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}. {cure}.")
    if value.dtype not in DTYPES:  # float8 stores numbers, it does not compute with them
        expected = "float16, bfloat16, float32 or float64" if value.is_floating_point() else "a floating-point tensor"
        raise TypeError(
            f"{name}: expected {expected}, got dtype {value.dtype}. Convert it first, for example {name}.float()."
        )
    return value


def check_matrix(name: str, value: Tensor, columns: int | None = None, *, axes: str, empty: bool = False) -> Tensor:
    """Return ``value`` if it is a floating-point matrix with ``columns`` columns. ``empty``: it may have no rows.

    ``axes`` names its axes.
    """
    check_floating(name, value)
    if value.ndim != 2:
        raise ValueError(
            f"{name}: expected shape {axes}, got {tuple(value.shape)}. "
            "Flatten every position to a row of its own, for example with einops.rearrange."
        )
    if (value.shape[0] == 0 and not empty) or value.shape[1] == 0:
        raise ValueError(f"{name}: expected a non-empty {axes}, got {tuple(value.shape)}. Skip empty batches.")
    if columns is not None and value.shape[1] != columns:
        raise ValueError(
            f"{name}: expected {columns} columns in {axes}, got {value.shape[1]} (shape {tuple(value.shape)}). "
            "Build both sides with the same size."
        )
    return value


def check_mask(name: str, value: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return ``value`` if it is None or a boolean tensor of ``shape``."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        came = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a boolean tensor (True = keep), got {came}. Convert it with {name}.bool().")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, one entry per latent, got {tuple(value.shape)}. "
            "Drop the latent axis from the mask and keep the others."
        )
    return value


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the computation: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
