"""The last latents of training, from which a head learns the shapes of its clusters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .kernels.layer_ops import remember_reference

MOST = 1 << 14  # latents at most
ENTRIES = 1 << 22  # numbers at most: 16 MiB
A_STEP = 16  # a step writes at most this part of the ring: maps would fill it with one batch


class RecentLatents(nn.Module):
    """A ring of the last latents of training. A step only copies its latents into it.

    It has room for 16,384 latents, or for as many as fit into 16 MiB. Each process keeps its own latents.

    Its tensors are no buffers: DistributedDataParallel sends every buffer at every step. They are in ``state_dict``
    once there are latents, and go along to devices. They keep their precision.

    Args:
        latent_dim: D.

    Attributes:
        latents: (Q, D) float32. A row of zeros holds no latent.
        count: () int64 number of rows written so far. The next row goes to slot ``count % Q``.
    """

    latents: Tensor
    count: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        size, device = min(MOST, max(A_STEP, ENTRIES // latent_dim)), torch.get_default_device()
        self.latents = torch.zeros(size, latent_dim, dtype=torch.float32, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.at_once = len(self.latents) // A_STEP

    @property
    def is_empty(self) -> bool:
        """Whether training has left no latent here. Reads from the device."""
        return not self.count.item()

    def filled(self) -> Tensor:
        """The latents (n, D) that are there. Reads from the device."""
        return self.latents[self.latents.any(1)]

    @torch.no_grad()
    def push(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Write rows of ``tokens`` (N, D) over the oldest. ``mask`` (N,) bool is True for those that count.

        Of more than Q / 16 rows it takes every n-th one, beginning with another one at each step.
        """
        if self.latents.device != tokens.device:
            self._apply(lambda x: x.to(tokens.device))
        remember_reference(self.latents, self.count, tokens.detach(), mask, self.at_once)

    def reset_parameters(self) -> None:
        """Forget all latents."""
        self.latents.zero_()
        self.count.zero_()

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name in ("latents", "count"):
            before = getattr(self, name)
            after = fn(before)
            setattr(self, name, after if after.dtype == before.dtype else before.to(after.device))
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.latents.is_meta and not self.is_empty:
            destination[prefix + "latents"], destination[prefix + "count"] = self.latents, self.count

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take over the ring of the state, or forget the latents if it has none."""
        latents, count = (state_dict.get(prefix + name) for name in ("latents", "count"))
        if self.latents.is_meta:
            self.latents, self.count = (
                torch.empty_like(self.latents, device="cpu"),
                self.count.new_empty((), device="cpu"),
            )
        if isinstance(latents, Tensor) and isinstance(count, Tensor):
            device = self.latents.device
            self.latents, self.count = latents.detach().to(device, copy=True), count.detach().to(device, copy=True)
        else:
            self.reset_parameters()
