"""The exact anchored MMD of the latents of all ranks. Each rank gathers all rows, computes, and keeps its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._distributed import broadcast_, gather_rows
from .mmd import Form, anchored_mmd_loss_reference, anchored_mmd_loss_without_graph

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gathered_mmd(
    residuals: Tensor,
    groups: Tensor,
    num_groups: int,
    form: Form,
    sampled: bool,
    generator: torch.Generator | None,
    compiled: bool,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """``proto_reg::anchored_mmd_loss`` of all ranks' rows: loss (), gradient by this rank's residuals (N, D).

    The first rank draws the sampled target for all: ranks with equal seeds would draw equal samples.
    """
    kernel, scales, unbiased, by_mass = form
    with torch.autocast(residuals.device.type, enabled=False):
        own = torch.nonzero((groups >= 0) & (groups < num_groups))[:, 0]
        # One gather takes rows and indices. As floats indices are exact below 2^24.
        rows, start = gather_rows(torch.cat([residuals, groups[:, None].to(residuals)], 1)[own], group)
        everything, members = rows[:, :-1].contiguous(), rows[:, -1].long()
        gradient = torch.zeros_like(residuals)
        if len(rows) == 0:
            return residuals.new_zeros(()), gradient
        samples = None
        if sampled:
            drawn = torch.empty_like(everything)
            samples = broadcast_(drawn.normal_(generator=generator) if start == 0 else drawn, group)
        # Residuals are latents around anchors at 0.
        arguments = everything, everything.new_zeros(num_groups, everything.shape[1]), members, None
        if compiled:
            loss, by_rows = anchored_mmd_loss_without_graph(*arguments, scales, unbiased, by_mass)
        else:
            with torch.no_grad():
                loss, by_rows = anchored_mmd_loss_reference(*arguments, scales, unbiased, by_mass, kernel, samples)
        return loss, gradient.index_copy_(0, own, by_rows[start : start + len(own)])


def gathered_weighted_mmd(
    z: Tensor,
    anchors: Tensor,
    weights: Tensor,
    form: Form,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """``proto_reg::weighted_mmd`` of all ranks' rows: loss (), gradients by own z (N, D) and by anchors (K, D)."""
    with torch.autocast(z.device.type, enabled=False):
        own = torch.nonzero((weights > 0).any(1))[:, 0]
        rows, start = gather_rows(torch.cat([z, weights], 1)[own], group)
        gradient = torch.zeros_like(z)
        if len(rows) == 0:
            return z.new_zeros(()), gradient, torch.zeros_like(anchors)
        everything, members = (part.contiguous() for part in rows.split([z.shape[1], len(anchors)], 1))
        loss, by_rows, by_anchors = torch.ops.proto_reg.weighted_mmd(everything, anchors, members, *form)
        return loss, gradient.index_copy_(0, own, by_rows[start : start + len(own)]), by_anchors
