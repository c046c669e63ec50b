"""``proto_reg::follow``: prototypes move on towards typical latents; schema, reference and registration.

An operator of its own because it writes to a parameter and to buffers: traced as plain tensor code, torch.compile would
recompute its result in the backward pass from buffers that have since been overwritten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rows


def follow_reference(prototypes: Tensor, sums: Tensor, mass: Tensor, seen: Tensor, rate: float) -> None:
    """If ``prototypes`` differ from ``seen``: move them by ``rate`` of the way to sums / mass and forget those.

    A single one moves in any case: its prototype loss has no gradient by which an optimizer could.

    Args:
        prototypes: (K, D), moved in place.
        sums, mass: (K, D) and (K,), latents observed since the last move, weighted, and their weights; zeroed in place.
        seen: (K, D), set in place to where the prototypes are now, with all its digits where it is the wider.
    """
    there = prototypes != seen.to(prototypes.dtype)
    moved = there.any() | (prototypes.shape[0] == 1)
    position = torch.where(there, prototypes.to(seen.dtype), seen)
    weighed = mass >= torch.finfo(mass.dtype).tiny  # less has no digits: latents out of all proportion
    way = sums / torch.where(weighed, mass, 1.0)[:, None] - position
    way = torch.where(moved & weighed[:, None], way, 0.0)
    seen.copy_(position.add(way, alpha=rate))
    prototypes.copy_(seen)
    sums.copy_(torch.where(moved, 0.0, sums))
    mass.copy_(torch.where(moved, 0.0, mass))


def followed(prototype_loss: Tensor, active: Tensor | None, mask: Tensor | None) -> Tensor:
    """(N,) or () bool: which latents of a pass are to be followed.

    None while the loss is not at work (``active``, see :func:`~.rows.at_work`, is 0 for it), or where it is NaN,
    for NaN codes say nothing of whose a latent is; else those that ``mask`` (N,) keeps.
    """
    counted = prototype_loss.isfinite()
    if active is not None:
        counted = counted & (rows.share_of(active, 0) > 0)
    return counted if mask is None else mask & counted


def follow(prototypes: Tensor, sums: Tensor, mass: Tensor, seen: Tensor, rate: float) -> None:
    """:func:`follow_reference` as an operator, compiled where it can be."""
    contiguous = prototypes.is_contiguous() and sums.is_contiguous() and seen.is_contiguous()
    single = contiguous and rows.compiled(prototypes, sums, seen)
    operator = torch.ops.proto_reg.follow_float32 if single else torch.ops.proto_reg.follow
    operator.default(prototypes, sums, mass, seen, rate)


def _fake(prototypes: Tensor, sums: Tensor, mass: Tensor, seen: Tensor, rate: float) -> None:
    return None


_SCHEMA = "(Tensor(a!) prototypes, Tensor(b!) sums, Tensor(c!) mass, Tensor(d!) seen, float rate) -> ()"
for _name in ("follow", "follow_float32"):  # only the second has a compiled kernel
    torch.library.define(f"proto_reg::{_name}", _SCHEMA)
    torch.library.impl(f"proto_reg::{_name}", "CompositeExplicitAutograd")(follow_reference)
    torch.library.register_fake(f"proto_reg::{_name}")(_fake)
