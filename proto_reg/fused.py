"""The layer's common training step as one compiled operator: when it can be, and its call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._distributed import alone_all
from .assigner import SinkhornAssigner
from .follower import PrototypeFollower
from .head import PrototypeHead
from .kernels import backends
from .kernels.rows import ordinary
from .mmd import AnchoredMMDLoss
from .usage import UsageMeter


class Schedule(NamedTuple):
    """What of a step's options may change from step to step; ``active`` and ``sharpness`` () or None for 1."""

    temperature: float
    prototype_weight: float
    mmd_weight: float
    active: Tensor | None
    sharpness: Tensor | None


class Counting(NamedTuple):
    """What a step is counted in: the layer's ``steps`` () int64, its meter, and its follower where it is at work."""

    steps: Tensor
    meter: UsageMeter
    follower: PrototypeFollower | None


def fused_step(
    z: Tensor,
    keep: Tensor | None,
    head: PrototypeHead,
    assigner: SinkhornAssigner,
    mmd: AnchoredMMDLoss,
    schedule: Schedule,
    counting: Counting | None,
) -> tuple[Tensor, ...] | None:
    """What ``proto_reg::balanced_step`` returns for latents ``z`` (N, D); None where something asks for more than it.

    It takes float32 on the CPU, components of our own classes with the Gaussian kernel and the analytic target, and
    this process's latents alone. With ``counting`` the step is added to that state.
    """
    prototypes, marginals = head.prototypes, assigner.marginals
    ours = type(head) is PrototypeHead and type(assigner) is SinkhornAssigner and type(mmd) is AnchoredMMDLoss
    if not ours or not head.in_closed_form() or torch.compiler.is_compiling() or not ordinary(z, prototypes):
        return None
    if mmd.kernel != "gaussian" or mmd.target != "analytic" or mmd.features is not None:
        return None
    if not all(backends.choose(backend, z) == "cpu" for backend in ("auto", assigner.backend, mmd.backend)):
        return None
    if not alone_all(assigner, mmd) or (marginals is not None and marginals.dtype != torch.float32):
        return None
    state: tuple[Tensor | None, ...] | None = (None,) * 5 if counting is None else _state(counting)
    if state is None:
        return None
    return torch.ops.proto_reg.balanced_step.default(
        z,
        keep,
        prototypes,
        marginals,
        schedule.active,
        schedule.sharpness,
        head.scores,
        assigner.epsilon,
        assigner.num_iters,
        assigner.tol,
        assigner.nan_policy == "isolate",
        schedule.temperature,
        mmd.scales,
        mmd.statistic == "unbiased",
        mmd.reduction == "mean",
        schedule.prototype_weight,
        schedule.mmd_weight,
        *state,
    )


def _state(counting: Counting) -> tuple[Tensor | None, ...] | None:
    """What the operator adds to; None where it cannot."""
    steps, meter, follower = counting
    if not alone_all(meter) or meter.totals.dtype != torch.float32:
        return None
    if follower is None or not follower.rate:
        return None, None, meter.counts, meter.totals, steps
    sums = follower.sums
    if not alone_all(follower) or not ordinary(sums) or not sums.is_contiguous():
        return None
    return sums, follower.counts, meter.counts, meter.totals, steps
