"""The layer's common training step as one compiled operator: when it can be, and its call."""

from __future__ import annotations

import torch
from torch import Tensor

from .assigner import SinkhornAssigner
from .follower import PrototypeFollower
from .functional.problem import reachable
from .head import PrototypeHead
from .kernels import backends
from .kernels.rows import ordinary
from .mmd import AnchoredMMDLoss
from .usage import UsageMeter

COMPILED = ("auto", "cpu")  # what a component's backend may be


def fused_step(
    z: Tensor,
    keep: Tensor | None,
    head: PrototypeHead,
    assigner: SinkhornAssigner,
    mmd: AnchoredMMDLoss,
    counters: tuple[PrototypeFollower | None, UsageMeter, Tensor] | None,
    active: Tensor | None,
    sharpness: Tensor | None,
    temperature: float,
    prototype_weight: float,
    mmd_weight: float,
) -> tuple[Tensor, ...] | None:
    """What ``proto_reg::balanced_step`` returns for latents ``z`` (N, D); None where something asks for more than it.

    It takes float32 on the CPU, components of our own classes with the Gaussian kernel and the analytic target, and
    this process's latents alone. ``counters`` are the follower, which moves the prototypes before and remembers their
    latents, the meter and the layer's steps; None counts nothing. ``active`` () or (2,), ``sharpness`` ():
    None for 1.
    """
    # One function, for in a training that does not fit the nearest caches each one more takes microseconds.
    ours = type(head) is PrototypeHead and type(assigner) is SinkhornAssigner and type(mmd) is AnchoredMMDLoss
    if not ours or not head.in_closed_form() or head.shards is not None or torch.compiler.is_compiling():
        return None
    if mmd.kernel != "gaussian" or mmd.target != "analytic" or mmd.features is not None:
        return None
    if assigner.backend not in COMPILED or mmd.backend not in COMPILED or backends.choose("auto", z) != "cpu":
        return None
    prototypes, marginals = head.prototypes, assigner.marginals
    sums = mass = seen = usage = totals = steps = None
    rate, follower = 0.0, None
    if counters is not None:
        follower, meter, steps = counters
        usage, totals = meter.counts, meter.totals
        if follower is not None:
            sums, mass, seen, rate = follower.sums, follower.mass, follower.seen, follower.rate
            head.to_write_to()
    # State is wider after .double(), and strided where the prototypes are.
    if not ordinary(z, prototypes) or any(
        x is not None and x.dtype != torch.float32 for x in (marginals, sums, totals)
    ):
        return None
    if sums is not None and not (sums.is_contiguous() and prototypes.is_contiguous()):
        return None
    tol = None if assigner.tol is None else reachable(assigner.tol, z.dtype, head.num_prototypes)
    results = torch.ops.proto_reg.balanced_step.default(
        z,
        keep,
        prototypes,
        marginals,
        active,
        sharpness,
        head.scores,
        head.std,
        assigner.epsilon,
        assigner.num_iters,
        tol,
        assigner.nan_policy == "isolate",
        temperature,
        mmd.scales,
        mmd.statistic == "unbiased",
        mmd.reduction == "mean",
        prototype_weight,
        mmd_weight,
        sums,
        mass,
        seen if prototypes.requires_grad else None,
        rate,
        usage,
        totals,
        steps,
    )
    if follower is not None and prototypes.requires_grad:
        follower.moved(prototypes)
    return results
