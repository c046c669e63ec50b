"""What changes over a training, as functions of a step count that never leaves its device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_number


def ramp(steps: Tensor, after: int, over: int) -> Tensor:
    """() float32: 0 before step ``after``, then linearly up in ``over`` steps, then 1; at once for ``over`` = 0."""
    return ((steps - after + 1).to(torch.float32) / (over + 1)).clamp(0, 1)


def sharpness(steps: Tensor, start: float, end: float, after: int, over: int) -> Tensor:
    """() float32 ``end / tau``, tau going linearly from ``start`` at step ``after`` to ``end`` in ``over`` steps.

    Scores times this, under the constant temperature ``end``, are scores under tau; under a constant epsilon they are
    scores under ``epsilon tau / end``: both anneal together.
    """
    left = 1 - ((steps - after).to(torch.float32) / over).clamp(0, 1)
    return end / (end + (start - end) * left)


def check_temperature(temperature: float | Sequence[float], temperature_steps: int) -> tuple[float, float]:
    """Start and end of a temperature that is a number or a pair of them; TypeError or ValueError otherwise."""
    pair = tuple(temperature) if isinstance(temperature, Sequence) else (temperature, temperature)
    if len(pair) != 2:
        raise ValueError(f"temperature: expected a number or (start, end), got {temperature!r}. Pass one or two.")
    start, end = (check_number("temperature", value, above=0) for value in pair)
    if (start != end) != (temperature_steps > 0):
        raise ValueError(
            f"temperature_steps: expected an int > 0 with two temperatures and 0 with one, got {temperature_steps} "
            f"with temperature={temperature!r}. Pass both temperature=(start, end) and temperature_steps."
        )
    return start, end
