"""Prototypes that follow the most typical of the latents assigned to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_number, compute_dtype
from ._distributed import Group, Ranks, local_part, sum_
from ._state import Record
from .kernels.follow import follow
from .kernels.rows import typical_sums


class Version:
    """A tensor's version, by torch's count of what was written to it, when it was last moved.

    No attribute of the module itself, whose setting costs microseconds. Copies, of tensors that count anew, forget it.
    """

    def __init__(self) -> None:
        self.moved: int | None = None

    def __getstate__(self) -> dict:
        return {"moved": None}


class PrototypeFollower(Record):
    """Whenever an optimizer has moved the prototypes, moves them on by a share of the way to their typical latents.

    Cosine scores give prototypes no radial gradient, and an optimizer's step is as small for them as for any weight:
    left to it, they stay at the distance from each other that they were initialised with. The mean of their latents
    tells both direction and distance, but of two kinds of example in one cluster it is neither. So latents weigh the
    less the farther they are (mean shift; :func:`~.kernels.rows.typical_sums_plain`), and prototypes go to a mode.

    Two things must come together: latents that were observed while the prototype loss was at work, and prototypes that
    are no longer where they were last seen. So whatever holds prototypes still holds them still here too: a frozen
    parameter, accumulation between steps, a step that GradScaler skipped. The comparison is made on the device; nothing
    waits for it.

    Where prototypes have been converted to half precision, ``seen`` keeps the digits that they cannot hold: a way too
    short for bfloat16 adds up there from step to step, until it shows.

    A single prototype has no gradient by which an optimizer could move it: it follows with every training pass.

    Args:
        prototypes: (K, D), for the shape and dtype of the state, which stays float32 or wider.
        rate: share of the way, in [0, 1); 0 leaves prototypes to the optimizer alone and keeps no state.
        group: the processes whose latents are summed: ``"default"``, None or a ProcessGroup.
    """

    sums: Tensor
    mass: Tensor
    seen: Tensor

    def __init__(self, prototypes: Tensor, rate: float, *, group: Group = "default") -> None:
        super().__init__()
        self.rate = check_number("follow_rate", rate, at_least=0)
        if self.rate >= 1:
            raise ValueError(f"follow_rate: expected a share in [0, 1), got {rate}. The default is 0.02.")
        self.ranks = Ranks(group)
        self.version = Version()
        if self.rate:
            like = prototypes.detach().to(compute_dtype(prototypes.dtype))
            self.register_buffer("sums", torch.zeros_like(like))
            self.register_buffer("mass", torch.zeros_like(like[:, 0]))
            # At the first step whatever the prototypes are counts as moved, and there are no latents yet.
            self.register_buffer("seen", torch.zeros_like(like))

    @torch.no_grad()
    def move(self, prototypes: Tensor, shards: Any = None) -> None:
        """Move ``prototypes`` (K, D) in place if they are no longer where they were last seen.

        ``shards``: the DTensor that they were gathered from, under FSDP2; it is moved too.
        """
        if not self.rate or not prototypes.requires_grad:
            return
        if shards is not None:
            self._move_shards(prototypes, shards)
            return
        # Fused optimizers do not keep torch's count, so the device compares in any case. Where nobody has touched them
        # by that count, a write of nothing goes past it too, for graphs that hold the prototypes would mind; so does
        # the move of a single prototype.
        touched = torch.compiler.is_compiling() or prototypes._version != self.version.moved
        follow(prototypes if touched else prototypes.data, self.sums, self.mass, self.seen, self.rate)
        self.moved(prototypes)

    def moved(self, prototypes: Tensor) -> None:
        """Tell graphs that hold what had been touched that it was moved since: compiled kernels do not."""
        if not torch.compiler.is_compiling() and prototypes._version != self.version.moved:
            torch.autograd.graph.increment_version(prototypes)
            self.version.moved = prototypes._version

    def _move_shards(self, prototypes: Tensor, shards: Any) -> None:
        """Every rank computes the same move of all prototypes, and makes it in its own part."""
        moved = prototypes.to(self.seen.dtype, copy=True)
        before = moved.clone()
        torch.ops.proto_reg.follow(moved, self.sums, self.mass, self.seen, self.rate)
        prototypes.copy_(moved)
        self.seen.copy_(prototypes)  # in the dtype that they are gathered in
        shards.to_local().add_(local_part(moved - before, shards))

    def observe(
        self,
        tokens: Tensor,
        assignments: Tensor,
        prototypes: Tensor,
        counted: Tensor | None = None,
        std: float = 1.0,
    ) -> None:
        """Remember the finite ones of latents ``tokens`` (N, D) by their ``prototypes`` (K, D), ``assignments`` (N,).

        ``counted`` (N,) or () bool says which latents count, ``std`` is the unit of distances. Sums are taken over all
        processes of the group.
        """
        if not self.rate:
            return
        both = typical_sums(tokens.to(self.sums.dtype), assignments, counted, prototypes, std)
        both = sum_(both, self.ranks.active())
        # Not +=, which would have the module register its buffers anew.
        self.sums.add_(both[:, :-1])
        self.mass.add_(both[:, -1])

    @torch.no_grad()
    def forget(self, index: Tensor, prototypes: Tensor) -> None:
        """Prototypes ``index`` (n,) were put elsewhere: their latents so far are those of others."""
        if not self.rate:
            return
        self.sums[index] = 0
        self.mass[index] = 0
        self.seen[index] = prototypes[index].to(self.seen.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
