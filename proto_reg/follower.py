"""Prototypes that follow the latents assigned to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ._checks import check_number, compute_dtype
from .kernels.follow import follow
from .kernels.rows import sums_by_group


class PrototypeFollower(nn.Module):
    """Whenever an optimizer has moved the prototypes, moves them on by a share of the way to their latents' mean.

    Cosine scores give prototypes no radial gradient, and an optimizer's step is as small for them as for any weight:
    left to it, they stay at the distance from each other that they were initialised with. The mean of their latents
    tells both direction and distance.

    Two things must come together: latents that were observed while the prototype loss was at work, and prototypes that
    are no longer where they were last seen. So whatever holds prototypes still holds them still here too: a frozen
    parameter, accumulation between steps, a step that GradScaler skipped. The comparison is made on the device; nothing
    waits for it.

    Args:
        prototypes: (K, D), for the shape and dtype of the state, which stays float32 or wider.
        rate: share of the way, in [0, 1); 0 leaves prototypes to the optimizer alone and keeps no state.
    """

    sums: Tensor
    counts: Tensor
    seen: Tensor

    def __init__(self, prototypes: Tensor, rate: float) -> None:
        super().__init__()
        self.rate = check_number("follow_rate", rate, at_least=0)
        if self.rate >= 1:
            raise ValueError(f"follow_rate: expected a share in [0, 1), got {rate}. The default is 0.02.")
        self._seen_version: int | None = None
        if self.rate:
            like = prototypes.detach().to(compute_dtype(prototypes.dtype))
            self.register_buffer("sums", torch.zeros_like(like))
            self.register_buffer("counts", torch.zeros_like(like[:, 0]))
            # At the first step whatever the prototypes are counts as moved, and there are no latents yet.
            self.register_buffer("seen", torch.zeros_like(like))

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """As any module's, but a half precision cannot count: the state is kept in float32 then."""
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.to(compute_dtype(buffer.dtype)))
        return self

    def __getstate__(self) -> dict:
        """A copy has other tensors, whose versions count anew."""
        return self.__dict__ | {"_seen_version": None}

    @torch.no_grad()
    def move(self, prototypes: Tensor) -> None:
        """Move ``prototypes`` (K, D) in place if they are no longer where they were last seen."""
        if not self.rate or not prototypes.requires_grad:
            return
        eager = not torch.compiler.is_compiling()
        # Untouched since the last look: not even a write of nothing, which graphs that hold them would mind.
        if eager and prototypes._version == self._seen_version:
            return
        follow(prototypes, self.sums, self.counts, self.seen, self.rate)
        if eager:
            self._seen_version = prototypes._version

    @torch.no_grad()
    def observe(self, tokens: Tensor, assignments: Tensor, counted: Tensor) -> None:
        """Remember the finite ones of latents ``tokens`` (N, D) by their prototypes ``assignments`` (N,).

        ``counted`` (N,) or () bool says which latents count. Sums are taken over all processes of the default group.
        """
        if not self.rate:
            return
        both = sums_by_group(tokens.to(self.sums.dtype), assignments, counted, len(self.counts))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        # Not +=, which would have the module register its buffers anew.
        self.sums.add_(both[:, :-1])
        self.counts.add_(both[:, -1])

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
