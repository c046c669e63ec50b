"""Prototypes that follow the most typical of the latents assigned to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_number, compute_dtype
from ._distributed import Group, Ranks, local_part, sum_
from ._state import Record
from .kernels.follow import follow
from .kernels.layer_ops import typical_sums


class Version:
    """A tensor's version, by torch's count of what was written to it, when it was last moved.

    No attribute of the module itself, whose setting costs microseconds. Copies, of tensors that count anew, forget it.
    """

    def __init__(self) -> None:
        self.moved: int | None = None

    def __getstate__(self) -> dict:
        return {"moved": None}


class PrototypeFollower(Record):
    """Moves the prototypes a share of the way to their typical latents, whenever an optimizer has moved them.

    Cosine scores give prototypes no radial gradient, and an optimizer's step is as small for them as for any weight. So
    without a follower they stay at their initial distance from each other. The mean of a prototype's latents tells
    direction and distance. But with two kinds of example in one cluster it is neither of them. So a latent counts the
    less the farther it is (mean shift), and prototypes go to a mode.

    A prototype moves if two things come together: latents were recorded while the prototype loss was at work, and the
    prototypes are no longer where they were last seen. So what holds prototypes still for an optimizer holds them still
    here too: a frozen parameter, accumulation between steps, a step that GradScaler skipped. The device makes the
    comparison; the host does not wait.

    In half precision a step may be too short for the prototypes. ``last_prototypes`` keeps the digits that they cannot
    hold, so short steps add up there until they show.

    A single prototype has no gradient by which an optimizer could move it. It follows with every training step.

    Args:
        prototypes: (K, D), for the shape and dtype of the state, which is float32 or wider.
        rate: share of the way, in [0, 1). 0 leaves prototypes to the optimizer alone and keeps no state.
        group: the processes whose latents are summed: ``"default"``, None or a ProcessGroup.
    """

    sums: Tensor
    weight_sums: Tensor
    last_prototypes: Tensor

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
            self.register_buffer("weight_sums", torch.zeros_like(like[:, 0]))
            # At the first step the prototypes count as moved, and there are no latents yet.
            self.register_buffer("last_prototypes", torch.zeros_like(like))

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
        follow(prototypes if touched else prototypes.data, self.sums, self.weight_sums, self.last_prototypes, self.rate)
        self.moved(prototypes)

    def moved(self, prototypes: Tensor) -> None:
        """Tell graphs that hold what had been touched that it was moved since: compiled kernels do not."""
        if not torch.compiler.is_compiling() and prototypes._version != self.version.moved:
            torch.autograd.graph.increment_version(prototypes)
            self.version.moved = prototypes._version

    def _move_shards(self, prototypes: Tensor, shards: Any) -> None:
        """Every rank computes the same move of all prototypes, and makes it in its own part."""
        moved = prototypes.to(self.last_prototypes.dtype, copy=True)
        before = moved.clone()
        torch.ops.proto_reg.follow(moved, self.sums, self.weight_sums, self.last_prototypes, self.rate)
        prototypes.copy_(moved)
        self.last_prototypes.copy_(prototypes)  # in the dtype that they are gathered in
        shards.to_local().add_(local_part(moved - before, shards))

    def observe(
        self,
        tokens: Tensor,
        assignments: Tensor,
        prototypes: Tensor,
        mask: Tensor | None = None,
        std: float = 1.0,
    ) -> None:
        """Record the finite latents among ``tokens`` (N, D) by their ``prototypes`` (K, D), ``assignments`` (N,).

        ``mask``: (N,) or () bool, True where a latent counts. ``std``: the unit of distances. Sums are over all
        processes of the group.
        """
        if not self.rate:
            return
        both = typical_sums(tokens.to(self.sums.dtype), assignments, mask, prototypes, std)
        both = sum_(both, self.ranks.active())
        # Not +=, which would have the module register its buffers anew.
        self.sums.add_(both[:, :-1])
        self.weight_sums.add_(both[:, -1])

    @torch.no_grad()
    def forget(self, index: Tensor, prototypes: Tensor) -> None:
        """Prototypes ``index`` (n,) were put elsewhere: their latents so far are those of others."""
        if not self.rate:
            return
        self.sums[index] = 0
        self.weight_sums[index] = 0
        self.last_prototypes[index] = prototypes[index].to(self.last_prototypes.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
