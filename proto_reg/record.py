"""What a training step leaves behind: latents to follow, adaptive marginals, counts, past latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .assigner import SinkhornAssigner
from .batch import BatchShard
from .follower import PrototypeFollower
from .head import PrototypeHead
from .kernels.follow import followed
from .kernels.snapshot import snapshot
from .output import RegularizerOutput
from .queue import LatentQueue
from .schedule import StepFactors
from .usage import UsageMeter


class Records(NamedTuple):
    """What a layer keeps from one training step to the next; ``steps``: () int64."""

    follower: PrototypeFollower
    meter: UsageMeter
    queue: LatentQueue | None
    steps: Tensor


def follow(head: PrototypeHead, follower: PrototypeFollower) -> None:
    """Prototypes go to the latents that were recorded before."""
    # FSDP1 leaves the head without a parameter. Prototypes computed elsewhere without autograd have no gradient.
    learns = head.prototypes.requires_grad or any(parameter.requires_grad for parameter in head.parameters())
    if follower.rate and learns:
        follower.move(head.to_write_to(), head.shards)


@torch.no_grad()
def record(
    batch: BatchShard,
    output: RegularizerOutput,
    factors: StepFactors,
    head: PrototypeHead,
    assigner: SinkhornAssigner,
    records: Records,
    temperature: float,
    prototype_weight: float,
) -> None:
    """Record a training step on ``batch``. Without a prototype loss there is nothing to follow."""
    tokens, mask, (follower, meter, queue, steps) = batch.tokens.detach(), batch.mask, records
    if prototype_weight:
        at_work = followed(output.prototype_loss, factors.shares, mask)
        follower.observe(tokens, output.assignments, head.prototypes.detach(), at_work, head.std)
        adapt(batch, output, factors, assigner, temperature)
    if head.clusters is not None:
        head.clusters.recent.push(tokens, mask)
    meter.observe(tokens, output.scores, head.prototypes, (output.prototype_loss, output.mmd_loss), mask)
    if queue is not None:
        queue.push(tokens, mask)
    if torch.compiler.is_compiling():
        steps.copy_(snapshot(steps) + 1)  # raises where a checkpoint runs the graph again
    else:
        steps.add_(1)


def adapt(
    batch: BatchShard,
    output: RegularizerOutput,
    factors: StepFactors,
    assigner: SinkhornAssigner,
    temperature: float,
) -> None:
    """Adaptive marginals follow the scores of a training step in which the prototype loss is at work."""
    if assigner.adaptive:
        scores = output.scores.detach()
        scores = scores if factors.sharpness is None else scores * factors.sharpness
        assigner.observe(scores, temperature, followed(output.prototype_loss, factors.shares, batch.mask))
