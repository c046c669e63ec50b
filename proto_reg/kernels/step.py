"""``proto_reg::balanced_step``: what the layer computes in a balanced training step, from latents to the direction that
is attached to them, as one operator; schema, plain-torch reference and registration.

On small batches the number of operators, and the Python between them, is what a layer costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .follow import follow_reference, followed
from .layer_ops import (
    add_at_weights,
    loss_of_shares,
    remember_reference,
    tally_reference,
    times_share,
    typical_sums_reference,
)
from .mmd import anchored_mmd_loss_reference, anchored_mmd_reference
from .scores import scores_and_pull_back
from .sinkhorn_reference import sinkhorn_cross_entropy_reference


def balanced_step_reference(
    z: Tensor,
    mask: Tensor | None,
    prototypes: Tensor,
    marginals: Tensor | None,
    shares: Tensor | None,
    sharpness: Tensor | None,
    similarity: str,
    std: float,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
    temperature: float,
    scales: list[float],
    unbiased: bool,
    by_mass: bool,
    prototype_weight: float,
    mmd_weight: float,
    sums: Tensor | None,
    weight_sums: Tensor | None,
    last_prototypes: Tensor | None,
    follow_rate: float,
    usage: Tensor | None,
    totals: Tensor | None,
    steps: Tensor | None,
    ring: Tensor | None,
    written: Tensor | None,
    at_once: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Prototypes follow; then both losses of ``z`` (N, D) and the direction in which they pull; then all is counted.

    Args:
        mask: (N,) bool, True where a row counts; None for all. A row that does not count must be finite.
        prototypes: (K, D); the MMD's anchors and the centres of the scores. ``last_prototypes`` moves them in place.
        shares: (2,) shares of their full size that the two weights have, or () that of both; None for 1. A loss with
            share 0 does not pull. Without the prototype loss nothing is followed.
        sharpness: (), a factor of the scores before ``epsilon`` and ``temperature`` apply; None for 1.
        similarity: one of ``SIMILARITIES``.
        std: standard deviation of the normal distribution around each prototype.
        marginals, epsilon, num_iters, tol, isolate: see :func:`~.sinkhorn_reference.sinkhorn_reference`.
        scales, unbiased, by_mass: see :func:`~.mmd.anchored_mmd_loss_reference`.
        prototype_weight, mmd_weight: sizes of the two parts of the direction.
        sums, weight_sums: (K, D) and (K,), to which :func:`~.layer_ops.typical_sums_reference` adds; None: not kept.
        last_prototypes, follow_rate: see :func:`~.follow.follow_reference`; None: nothing follows.
        usage, totals: (K,) int64 and (4,), to which :func:`~.layer_ops.tally_reference` adds; None: not kept.
        steps: () int64, to which 1 is added; None: not kept.
        ring, written, at_once: see :func:`~.layer_ops.remember_reference`; None: not kept.

    Returns:
        direction: (N, D) to be multiplied with |g| and added to the gradient g at ``z``.
        step: (K, D) of the prototypes, to be multiplied with |g|.
        loss, prototype_loss, mmd_loss: ()
        scores, codes: (N, K)
        assignments: (N,) int64 largest code of each row.
    """
    if sums is not None and weight_sums is not None and last_prototypes is not None:
        follow_reference(prototypes, sums, weight_sums, last_prototypes, follow_rate)
    sharp = 1.0 if sharpness is None else sharpness
    weights = None if mask is None else mask.to(z.dtype)
    found, pull_back = scores_and_pull_back(z, prototypes, similarity, std)
    prototype_loss, by_scores, _, codes = sinkhorn_cross_entropy_reference(
        found * sharp, marginals, weights, epsilon, num_iters, tol, isolate, temperature, True
    )
    by_tokens, by_prototypes = pull_back(by_scores * sharp)
    assignments = codes.argmax(1)
    # Its gradient is that by z / std: balanced, it pulls the same way.
    mmd_loss, by_latents = anchored_mmd_loss_reference(
        z / std, prototypes / std, assignments, mask, scales, unbiased, by_mass, statistic=anchored_mmd_reference
    )
    norms = torch.linalg.vector_norm(by_tokens), torch.linalg.vector_norm(by_latents)
    direction, scale = add_at_weights(by_tokens, by_latents, norms, prototype_weight, mmd_weight, shares)
    step = times_share(scale * by_prototypes, shares, 0)
    loss = loss_of_shares(prototype_weight * prototype_loss, mmd_weight * mmd_loss, shares)
    if sums is not None and weight_sums is not None:
        both = typical_sums_reference(z, assignments, followed(prototype_loss, shares, mask), prototypes, std)
        sums.add_(both[:, :-1])
        weight_sums.add_(both[:, -1])
    if usage is not None and totals is not None and steps is not None:
        tally_reference(usage, totals, z, found, prototypes, mask, prototype_loss, mmd_loss)
        steps.add_(1)
    if ring is not None and written is not None:
        remember_reference(ring, written, z, mask, at_once)
    return direction, step, loss, prototype_loss, mmd_loss, found, codes, assignments


torch.library.define(
    "proto_reg::balanced_step",
    "(Tensor z, Tensor? mask, Tensor(a!) prototypes, Tensor? marginals, Tensor? shares, Tensor? sharpness, "
    "str similarity, float std, float epsilon, int num_iters, float? tol, bool isolate, float temperature, "
    "float[] scales, bool unbiased, bool by_mass, float prototype_weight, float mmd_weight, Tensor(b!)? sums, "
    "Tensor(c!)? weight_sums, Tensor(d!)? last_prototypes, float follow_rate, Tensor(e!)? usage, Tensor(f!)? totals, "
    "Tensor(g!)? steps, Tensor(h!)? ring, Tensor(i!)? written, int at_once) -> "
    "(Tensor direction, Tensor step, Tensor loss, Tensor prototype_loss, Tensor mmd_loss, Tensor scores, "
    "Tensor codes, Tensor assignments)",
)
torch.library.impl("proto_reg::balanced_step", "CompositeExplicitAutograd")(torch.no_grad()(balanced_step_reference))
# Its gradients are what it returns: there is no graph to build.
torch.library.impl("proto_reg::balanced_step", "Autograd")(torch.library.fallthrough_kernel)


@torch.library.register_fake("proto_reg::balanced_step")
def _fake(z: Tensor, mask: Tensor | None, prototypes: Tensor, *options: object) -> tuple[Tensor, ...]:
    rows, groups = z.shape[0], prototypes.shape[0]
    contiguous = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (z, prototypes)]
    matrices = [z.new_empty(rows, groups) for _ in range(2)]
    return *contiguous, *(z.new_empty(()) for _ in range(3)), *matrices, z.new_empty(rows, dtype=torch.int64)
