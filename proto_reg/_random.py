"""Random numbers as functions of a counter. They leave the user's random stream alone, and resuming is exact."""

from __future__ import annotations

from torch import Tensor


def mix(counter: Tensor) -> Tensor:
    """int64 ``counter`` with its bits well mixed (splitmix64's finalizer), of the same shape."""
    for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        counter = (counter ^ (counter >> 29)) * multiplier
    return counter ^ (counter >> 32)


def normal(counter: Tensor) -> Tensor:
    """A draw of N(0, 1), float32, for each entry of ``counter``."""
    # 24 bits, the middle of each of their cells: never 0 or 1.
    uniform = ((mix(counter * -0x61C8864680B583EB) >> 20) & 0xFFFFFF).float() * 2**-23 + (2**-24 - 1)
    return uniform.erfinv() * 2**0.5
