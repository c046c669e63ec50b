"""Noise between the layer and the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._checks import check_number, check_positive_int
from ._state import Record
from .functional.noise import with_noise
from .kernels.snapshot import snapshot
from .layout import Layout
from .replay import Replay


class LatentNoise(Record):
    """Adds noise to what the decoder gets in training: ``decoder(noise(z))`` behind the layer.

    In training mode it returns ``z + size |z| / sqrt(D) e``, e ~ N(0, I) from torch's random state. In eval mode it
    returns z. The decoder learns the directions that latents leave empty and samples do not: docs/training.md,
    "Noise for the decoder".

    Args:
        size: size of the noise relative to each latent's own, >= 0.
        steps: number of training forward passes with noise; 0 for all. A last epoch without noise wins most of the
            reconstruction back that the noise costs.
        layout: einops pattern of the latents, as the layer has it.

    Attributes:
        steps_done: () int64, training forward passes so far. It is counted only if ``steps`` is not 0.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """

    steps_done: Tensor

    def __init__(self, size: float, steps: int = 0, *, layout: str = "b d") -> None:
        super().__init__()
        self.size = check_number("size", size, at_least=0)
        self.steps = check_positive_int("steps", steps, minimum=0)
        self.layout = Layout(layout)
        self.replay = Replay()
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))

    if TYPE_CHECKING:

        def __call__(self, z: Tensor, mask: Tensor | None = None) -> Tensor: ...

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """``z`` with noise in training mode, in its shape and dtype. ``mask``, z's shape without d, is True where
        noise is added.

        Raises:
            TypeError, ValueError: latents or mask of another rank, size or dtype.
        """
        self.layout.check_rank(z)
        if not self.training or not self.size:
            return z
        return self.replay.run(self._add, self._changing if self.steps else None, bool(self.steps), z, mask)

    def _add(self, counting: bool, z: Tensor, mask: Tensor | None) -> Tensor:
        size: Tensor | float = self.size
        if self.steps:
            size = torch.where(snapshot(self.steps_done) < self.steps, self.size, 0.0).to(torch.float32)
        if counting:
            self.steps_done.copy_(snapshot(self.steps_done) + 1)
        return with_noise(z, size, dim=self.layout.latent_axis, mask=mask)

    def _changing(self) -> list[tuple[LatentNoise, str]]:
        return [(self, "steps_done")]

    def extra_repr(self) -> str:
        return f"{self.size:g}, steps={self.steps}, layout={self.layout.pattern!r}"
