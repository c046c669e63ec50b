"""What changes over a training: the weights of the two losses, and the temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_number, check_positive_int


class StepFactors(NamedTuple):
    """What a :class:`Schedule` says of one step. None stands for 1.

    ``shares``: (2,) float32, the shares of their full size that the weights of prototype loss and MMD have.
    ``sharpness``: (), the factor of the scores; see :meth:`Schedule.sharpness`.
    """

    shares: Tensor | None
    sharpness: Tensor | None


@dataclass(frozen=True)
class Schedule:
    """When the two losses set in, and at which temperature.

    A training goes through these phases. Steps are training forward passes of the layer, with gradients enabled.

    1. ``warmup_steps`` steps: reconstruction alone.
    2. ``mmd_steps`` steps: the MMD alone, with the weight ``mmd_weight``. Latents take their scale while prototypes
       stay where they are. This phase improves the reconstruction: docs/training.md, "The schedule".
    3. All other steps: both losses, with the layer's own weights.

    A weight that sets in grows linearly over ``ramp_steps`` steps.

    Args:
        warmup_steps: length of phase 1.
        mmd_steps: length of phase 2. It has no steps where the layer's ``mmd_weight`` is 0.
        mmd_weight: the MMD's weight lambda_r in phase 2, >= 0.
        ramp_steps: steps in which a weight grows from 0.
        temperature: tau of eq. 10, > 0. A pair ``(start, end)`` goes linearly from one to the other; it begins with
            phase 3.
        temperature_steps: steps from ``start`` to ``end``; 0 for one temperature.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """

    warmup_steps: int = 0
    mmd_steps: int = 50  # on MNIST an epoch has 2 % less error; on the digits 100 steps have more
    mmd_weight: float = 0.5
    ramp_steps: int = 0
    temperature: float | Sequence[float] = 0.1
    temperature_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "mmd_steps", "ramp_steps", "temperature_steps"):
            check_positive_int(name, getattr(self, name), minimum=0)
        check_number("mmd_weight", self.mmd_weight, at_least=0)
        start, end = self._temperatures
        if (start != end) != (self.temperature_steps > 0):
            raise ValueError(
                "temperature_steps: expected an int > 0 with two temperatures and 0 with one, got "
                f"{self.temperature_steps} with temperature={self.temperature!r}. Pass both temperature=(start, end) "
                "and temperature_steps."
            )
        self.begin, self.end, self.final_temperature  # noqa: B018  (computed once, before any graph is traced)

    @cached_property
    def begin(self) -> int:
        """The step at which the prototype loss sets in."""
        return self.warmup_steps + self.mmd_steps

    @cached_property
    def end(self) -> int:
        """The step from which both weights have their full size."""
        return self.begin + self.ramp_steps

    @cached_property
    def final_temperature(self) -> float:
        """The temperature after ``temperature_steps`` steps."""
        return self._temperatures[1]

    @cached_property
    def _temperatures(self) -> tuple[float, float]:
        """Start and end of the temperature. TypeError or ValueError for anything but a number or a pair of them."""
        given = self.temperature
        pair = tuple(given) if isinstance(given, Sequence) else (given, given)
        if len(pair) != 2:
            raise ValueError(f"temperature: expected a number or (start, end), got {given!r}. Pass one or two.")
        start, end = (check_number("temperature", value, above=0) for value in pair)
        return start, end

    def at(self, now: Callable[[], Tensor], reached: float, mmd_weight: float) -> StepFactors:
        """What the schedule says of this step.

        Args:
            now: returns the step, () int64, on its device. It is called only if the schedule depends on it.
            reached: a step that training is known to have reached. It spares operators once the schedule is over.
            mmd_weight: the layer's, the full size of the MMD's weight.
        """
        shares = self.loss_shares(now(), mmd_weight) if self.end and reached < self.end else None
        return StepFactors(shares, self.sharpness(now()) if self.temperature_steps else None)

    def loss_shares(self, step: Tensor, mmd_weight: float) -> Tensor:
        """(2,) float32: the weights of prototype loss and MMD at ``step`` () as shares of their full size.

        The MMD's share may exceed 1 in phase 2: its full size is the layer's ``mmd_weight``.
        """
        both = self._ramp(step, self.begin)
        if not self.mmd_steps:
            return torch.stack([both, both])
        alone = self.mmd_weight / mmd_weight if mmd_weight else 0.0
        mmd = self._ramp(step, self.warmup_steps)
        return torch.stack([both, torch.where(step < self.begin, alone * mmd, mmd)])

    def temperature_at(self, step: Tensor) -> Tensor:
        """() float32: the temperature at ``step`` ()."""
        start, end = self._temperatures
        left = 1 - ((step - self.begin).to(torch.float32) / max(self.temperature_steps, 1)).clamp(0, 1)
        return end + (start - end) * left

    def sharpness(self, step: Tensor) -> Tensor:
        """() float32: the final temperature over that of ``step`` ().

        The layer multiplies scores by it and keeps temperature and epsilon constant. So epsilon anneals in proportion.
        With a constant epsilon, codes and predictions would part at the start, or meet, where the gradient is 0.
        """
        return self.final_temperature / self.temperature_at(step)

    def _ramp(self, step: Tensor, after: int) -> Tensor:
        """() float32: 0 before step ``after``, then linearly up to 1."""
        return ((step - after + 1).to(torch.float32) / (self.ramp_steps + 1)).clamp(0, 1)


NEVER = -math.inf  # ``reached`` where nobody knows
