"""Both losses of a batch, their gradients in closed form, and the direction in which they pull. No graph is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .assigner import SinkhornAssigner
from .balance import add_up
from .batch import BatchShard, subsample
from .head import PrototypeHead
from .kernels.layer_ops import loss_of_shares, times_share
from .mmd import AnchoredMMDLoss
from .output import RegularizerOutput
from .queue import LatentQueue
from .schedule import StepFactors


class Gradients(NamedTuple):
    """Both losses of N latents, and their gradients.

    ``output``: without its ``loss``, which is 0. ``by_tokens`` (N, D) and ``by_parameters``: gradients of the prototype
    loss by the latents and by the head's parameters. ``by_latents`` (N, D): the MMD's gradient by the latents.
    """

    output: RegularizerOutput
    by_tokens: Tensor
    by_parameters: Sequence[Tensor]
    by_latents: Tensor


class Pull(NamedTuple):
    """What a balanced step adds to the gradients that arrive, to be multiplied with their norm |g|.

    ``direction`` (N, D): of the latents. ``steps``: the head's parameters, and the step of each. ``output``: what was
    computed.
    """

    direction: Tensor
    steps: list[tuple[nn.Parameter, Tensor]]
    output: RegularizerOutput


def loss_gradients(
    batch: BatchShard,
    head: PrototypeHead,
    assigner: SinkhornAssigner,
    mmd: AnchoredMMDLoss,
    queue: LatentQueue | None,
    sharpness: Tensor | None,
    temperature: float,
    now: Callable[[], Tensor],
    training: bool,
) -> Gradients:
    """Both losses of ``batch`` and their gradients. As in Algorithm 1, the MMD holds its anchors fixed.

    Args:
        queue: past latents, which enter the balance but not the loss. Today's prototypes score them.
        sharpness: (), a factor of the scores before the temperature and the assigner's epsilon apply; None for 1.
        now: returns the step, () int64, which decides the MMD's subsample.
        training: take the argmax of the codes for assignments, and use the queue; in eval mode that of the scores.
    """
    tokens, mask = batch.tokens, batch.mask
    rows = tokens.shape[0]
    scores, pull_back = head.scores_and_pull_back(tokens)
    if queue is None or not training:
        to_balance, balanced_mask, loss_rows = scores, mask, None
    else:
        to_balance, balanced_mask = queue.append_past(scores, mask, batch.group, head)
        loss_rows = rows
    to_balance = to_balance if sharpness is None else to_balance * sharpness
    prototype_loss, by_scores, codes = assigner.cross_entropy_and_gradient(
        to_balance, temperature, mask=balanced_mask, rows=loss_rows
    )
    codes = codes if loss_rows is None else codes[:rows]
    assignments = (codes if training else scores).argmax(1)
    by_tokens, by_parameters = pull_back(by_scores if sharpness is None else by_scores * sharpness)
    mmd_loss, by_latents = _mmd(batch, assignments, head, mmd, now)
    output = RegularizerOutput(prototype_loss.new_zeros(()), prototype_loss, mmd_loss, scores, codes, assignments)
    return Gradients(output, by_tokens, by_parameters, by_latents)


def _mmd(
    batch: BatchShard, assignments: Tensor, head: PrototypeHead, mmd: AnchoredMMDLoss, now: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """The MMD () of at most ``mmd.max_tokens`` latents, and its gradient by all of them (N, D)."""
    tokens, anchors = batch.tokens, head.prototypes.detach()
    # An exporter would take the comparison for a bound on the number of latents.
    if torch.compiler.is_exporting() or batch.total <= mmd.max_tokens:
        return mmd.value_and_gradient(tokens, anchors, assignments, batch.mask, head.std)
    index, chosen = subsample(batch, mmd.max_tokens, now(), mmd.options.seed)
    loss, by_chosen = mmd.value_and_gradient(tokens[index], anchors, assignments[index], chosen, head.std)
    return loss, torch.zeros_like(tokens).index_copy_(0, index, by_chosen)


def pull(
    gradients: Gradients,
    parameters: Sequence[nn.Parameter],
    batch: BatchShard,
    factors: StepFactors,
    prototype_weight: float,
    mmd_weight: float,
) -> Pull:
    """The direction of both ``gradients`` at their weights, norms over the batch of all processes."""
    output, shares = gradients.output, factors.shares
    direction, scale = add_up(
        gradients.by_tokens, gradients.by_latents, prototype_weight, mmd_weight, batch.group, shares
    )
    steps = [times_share(scale * gradient, shares, 0) for gradient in gradients.by_parameters]
    loss = loss_of_shares(prototype_weight * output.prototype_loss, mmd_weight * output.mmd_loss, shares)
    return Pull(direction, list(zip(parameters, steps, strict=True)), output._replace(loss=loss))
