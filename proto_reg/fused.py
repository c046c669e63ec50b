"""The layer's common training step as one compiled operator: whether it can be, and its call."""

from __future__ import annotations

import torch

from .assigner import SinkhornAssigner
from .batch import BatchShard
from .functional.sinkhorn_arguments import reachable
from .head import PrototypeHead
from .kernels import backends
from .kernels.layer_ops import ordinary
from .mmd import AnchoredMMDLoss
from .output import RegularizerOutput
from .pull import Pull
from .record import Records, adapt
from .schedule import StepFactors

COMPILED = ("auto", "cpu")  # what a component's backend may be


def fused_pull(
    batch: BatchShard,
    head: PrototypeHead,
    assigner: SinkhornAssigner,
    mmd: AnchoredMMDLoss,
    records: Records | None,
    factors: StepFactors,
    temperature: float,
    prototype_weight: float,
    mmd_weight: float,
) -> Pull | None:
    """Follow, pull and record by ``proto_reg::balanced_step``; None if the step asks for more than it can.

    It takes float32 on the CPU, components of our own classes with the Gaussian kernel and the analytic target, and
    the latents of one process without a queue. ``records``: None records nothing.
    """
    # One function: in a training that does not fit the nearest caches each one more takes microseconds.
    ours = type(head) is PrototypeHead and type(assigner) is SinkhornAssigner and type(mmd) is AnchoredMMDLoss
    if not ours or not head.in_closed_form() or head.shards is not None or torch.compiler.is_compiling():
        return None
    form, z = mmd.options, batch.tokens
    if form.kernel != "gaussian" or form.target != "analytic" or form.features is not None:
        return None
    if batch.total > mmd.max_tokens or assigner.backend not in COMPILED or form.backend not in COMPILED:
        return None
    if backends.choose("auto", z) != "cpu":
        return None
    prototypes, marginals = head.prototypes, assigner.marginals
    sums = weight_sums = last_prototypes = usage = totals = steps = recent = None
    rate, follower = 0.0, None
    if records is not None:
        usage, totals, steps = records.meter.counts, records.meter.totals, records.steps
        recent = None if head.clusters is None else head.clusters.recent
        if records.follower.rate:
            if not prototype_weight:
                return None
            follower = records.follower
            sums, weight_sums, rate = follower.sums, follower.weight_sums, follower.rate
            last_prototypes = follower.last_prototypes if prototypes.requires_grad else None
            head.to_write_to()
    # State is wider after .double(), and strided where the prototypes are.
    if not ordinary(z, prototypes) or any(
        x is not None and x.dtype != torch.float32 for x in (marginals, sums, totals)
    ):
        return None
    if sums is not None and not (sums.is_contiguous() and prototypes.is_contiguous()):
        return None
    direction, step, *results = torch.ops.proto_reg.balanced_step.default(
        z,
        batch.mask,
        prototypes,
        marginals,
        factors.shares,
        factors.sharpness,
        head.similarity,
        head.std,
        assigner.epsilon,
        assigner.num_iters,
        None if assigner.tol is None else reachable(assigner.tol, z.dtype, head.num_prototypes),
        assigner.nan_policy == "isolate",
        temperature,
        form.scales,
        form.statistic == "unbiased",
        form.reduction == "mean",
        prototype_weight,
        mmd_weight,
        sums,
        weight_sums,
        last_prototypes,
        rate,
        usage,
        totals,
        steps,
        None if recent is None else recent.latents,
        None if recent is None else recent.count,
        0 if recent is None else recent.at_once,
    )
    pulled = Pull(direction, [(prototypes, step)], RegularizerOutput._make(results))
    if follower is not None and prototypes.requires_grad:
        follower.moved(prototypes)
    if records is not None and prototype_weight:
        adapt(batch, pulled.output, factors, assigner, temperature)
    return pulled
