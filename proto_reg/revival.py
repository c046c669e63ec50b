"""Puts unused prototypes where latents are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._checks import check_number
from ._distributed import broadcast_, is_sharded, local_part, sum_, whole
from .functional.metrics import SEPARATION
from .head import PrototypeHead
from .mixture import kmeans_plus_plus

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def revive(
    head: PrototypeHead,
    usage: Tensor,
    latents: Tensor,
    optimizer: Optimizer | None,
    threshold: float | None,
    duplicates: bool,
    generator: torch.Generator | None,
    group: ProcessGroup | None,
) -> Tensor:
    """Put prototypes of small ``usage`` (K,) on ``latents`` (N, D); returns their indices (n,).

    See :meth:`proto_reg.PrototypicalRegularizer.revive`.
    """
    check_optimizer(optimizer, head.prototypes)
    if not usage.any():
        raise RuntimeError(
            "revive: expected training steps since the last reset, got none. Call it at the end of an epoch, before "
            "reset_metrics()."
        )
    gone = unused(usage, threshold)
    prototypes = whole(head.prototypes.detach())
    if duplicates:
        gone = gone | superfluous(prototypes / head.std, usage, ~gone)
    index = gone.nonzero()[:, 0]
    if len(index):
        head.place(index, draw_far(prototypes, gone, latents, generator, group))
        forget_rows(optimizer, head.prototypes, index)
    return index


def unused(usage: Tensor, threshold: float | None) -> Tensor:
    """(K,) bool: prototypes whose share of the latents ``usage`` (K,) is below ``threshold``, .1 / K by default."""
    threshold = 0.1 / len(usage) if threshold is None else check_number("threshold", threshold, at_least=0)
    # A threshold above an equal share could name every prototype. Then no living one would be left.
    if threshold >= 1 / len(usage):
        raise ValueError(
            f"threshold: expected a share below 1/K = {1 / len(usage):.3g}, got {threshold:g}. The default is .1 / K."
        )
    return usage < threshold


def superfluous(prototypes: Tensor, usage: Tensor, alive: Tensor) -> Tensor:
    """(K,) bool: the ``alive`` among ``prototypes`` (K, D) that lie within 2 of one that has more latents and stays.

    Distances are in units of std."""
    v = prototypes.float().cpu()
    near = torch.cdist(v, v, compute_mode="donot_use_mm_for_euclid_dist") < SEPARATION
    alive, stays = alive.cpu(), torch.zeros(len(v), dtype=torch.bool, device=v.device)
    for k in usage.cpu().argsort(descending=True, stable=True).tolist():
        stays[k] = bool(alive[k]) and not bool((near[k] & stays).any())
    return (alive & ~stays).to(prototypes.device)


def draw_far(
    prototypes: Tensor, gone: Tensor, latents: Tensor, generator: torch.Generator | None, group: ProcessGroup | None
) -> Tensor:
    """Rows (n, D) of ``latents`` (N, D) for the n prototypes of ``gone`` (K,), far from the others and each other.

    K-means++ (Arthur and Vassilvitskii, 2007) goes on from the living prototypes. In a process group all ranks take the
    draw of the first. If one rank has too few latents, all raise.

    Raises:
        ValueError: fewer finite latents than prototypes to revive.
    """
    count = int(gone.sum())
    latents = latents[latents.isfinite().all(1)].to(prototypes.device)
    # All ranks must raise together: otherwise some would wait for ever.
    too_few = torch.tensor(float(len(latents) < count), dtype=torch.float32, device=latents.device)
    if sum_(too_few, group):
        raise ValueError(
            f"z: expected at least {count} finite latents, one for each prototype to revive, got {len(latents)}. "
            "Encode more of the data."
        )
    living = prototypes[~gone].to(latents.dtype)
    return broadcast_(latents[kmeans_plus_plus(latents, count, generator, living)].contiguous(), group)


def check_optimizer(optimizer: Optimizer | None, prototypes: Tensor) -> None:
    """TypeError or ValueError unless ``optimizer`` is None or one that steps on ``prototypes``."""
    if optimizer is None:
        return
    groups = getattr(optimizer, "param_groups", None)
    if groups is None or not hasattr(optimizer, "state"):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}. Pass yours.")
    if not any(parameter is prototypes for group in groups for parameter in group["params"]):
        raise ValueError(
            "optimizer: expected the one that holds the layer's prototypes, got one without them. Pass that, or none."
        )


def forget_rows(optimizer: Optimizer | None, prototypes: Tensor, index: Tensor) -> None:
    """Zero the rows ``index`` of the optimizer's state of ``prototypes``, such as its moments."""
    state = {} if optimizer is None else optimizer.state.get(prototypes, {})
    for value in state.values():
        if not isinstance(value, Tensor) or value.shape != prototypes.shape:
            continue
        if is_sharded(value):
            kept = torch.ones(value.shape, dtype=value.dtype, device=index.device)
            kept[index] = 0
            cast(Any, value).to_local().mul_(local_part(kept, value))
        else:
            value[index] = 0
