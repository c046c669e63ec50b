"""Prototypes that follow the latents assigned to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import kernels  # noqa: F401  (registers torch.ops.proto_reg)
from ._checks import check_number


class PrototypeFollower(nn.Module):
    """Whenever an optimizer has moved the prototypes, moves them on by a share of the way to their latents' mean.

    Cosine scores give prototypes no radial gradient, and an optimizer's step is as small for them as for any weight:
    left to it, they stay at the distance from each other that they were initialised with. The mean of their latents
    tells both direction and distance. Because only an optimizer's step sets it off, whatever holds prototypes still
    (a frozen parameter, warm-up, a weight of 0, K = 1, accumulation between steps, a step skipped by GradScaler) holds
    them still here too. The test is a comparison on the device; nothing waits for it.

    Args:
        num_prototypes, latent_dim: K, D.
        rate: share of the way, in [0, 1); 0 leaves prototypes to the optimizer alone and keeps no state.
    """

    sums: Tensor
    counts: Tensor
    seen: Tensor

    def __init__(self, num_prototypes: int, latent_dim: int, rate: float) -> None:
        super().__init__()
        self.rate = check_number("follow_rate", rate, at_least=0)
        if self.rate >= 1:
            raise ValueError(f"follow_rate: expected a share in [0, 1), got {rate}. The default is 0.02.")
        if self.rate:
            self.register_buffer("sums", torch.zeros(num_prototypes, latent_dim))
            self.register_buffer("counts", torch.zeros(num_prototypes))
            # At the first step whatever the prototypes are counts as moved, and there are no latents yet.
            self.register_buffer("seen", torch.zeros(num_prototypes, latent_dim))

    @torch.no_grad()
    def move(self, prototypes: Tensor) -> None:
        """Move ``prototypes`` (K, D) in place if they are no longer where they were last seen."""
        if self.rate:
            torch.ops.proto_reg.follow(prototypes, self.sums, self.counts, self.seen, self.rate)

    @torch.no_grad()
    def observe(self, tokens: Tensor, assignments: Tensor, keep: Tensor | None) -> None:
        """Remember latents ``tokens`` (N, D) by their prototypes ``assignments`` (N,), over all processes if there are
        several; latents that are not finite, or that ``keep`` leaves out, are not remembered."""
        if not self.rate:
            return
        usable = tokens.isfinite().all(1)
        usable = usable if keep is None else usable & keep
        tokens = torch.where(usable[:, None], tokens, 0.0).to(self.sums.dtype)
        ones = usable.to(tokens.dtype)[:, None]
        both = torch.zeros_like(torch.cat([self.sums, self.counts[:, None]], 1))
        both = both.index_add(0, assignments, torch.cat([tokens, ones], 1))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        self.sums += both[:, :-1]
        self.counts += both[:, -1]

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
