"""The std that training aims at follows the scale that the latents have, unless it was given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._distributed import sum_
from .batch import BatchShard
from .head import PrototypeHead

EVERY = 400  # training steps from one look to the next
LATE = 1600  # training steps after which the scale of the latents is no longer a start
# Factors of r^2/D that are left alone, before LATE steps and after. On the digits .5 after 200 steps came to .93 at
# 1600, and on Fashion-MNIST .28 came to 1: what is small at first is no scale of the latents.
FAR, NEAR = 8.0, 1.25


def due(step: int) -> bool:
    """Whether it is time to look at the scale after ``step`` training steps with the prototype loss."""
    return step > 0 and step % EVERY == 0


@torch.no_grad()
def follow_scale(head: PrototypeHead, batch: BatchShard, assignments: Tensor, step: int) -> None:
    """Set the std of ``head`` to that of the latents of ``batch``, if r^2/D is far from 1. Reads from the device.

    A reconstruction decides how far apart an encoder puts latents. The MMD can only push a little: against a linear
    output and a squared error it reaches r^2/D = .3. A std that fits the latents costs nothing, and early on a wider
    one helps. So the std stays until the latents have a scale, and follows it from then on.

    Args:
        assignments: (N,) int64, the prototype of each latent.
        step: of the training with the prototype loss.
    """
    tokens, prototypes = batch.tokens.detach(), head.prototypes.detach()
    radius = (tokens - prototypes.to(tokens.dtype)[assignments]).square().mean(1)
    counts = radius.isfinite() if batch.mask is None else radius.isfinite() & batch.mask
    total = torch.stack([torch.where(counts, radius, 0.0).sum(), counts.sum()])
    squared, count = sum_(total.double(), batch.group).tolist()
    ratio = squared / max(count, 1) / head.std**2
    far = FAR if step < LATE else NEAR
    if ratio > 0 and not 1 / far <= ratio <= far:
        # Few digits, which a saved state keeps exactly.
        head.std = float(f"{head.std * math.sqrt(ratio):.3g}")
