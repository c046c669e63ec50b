"""``proto_reg::follow``: prototypes move towards typical latents; schema, reference and registration.

It is an operator because it writes to a parameter and to buffers. If torch.compile traced it as plain tensor code, the
backward pass would recompute its result from buffers that have since been overwritten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import layer_ops


def follow_reference(
    prototypes: Tensor, sums: Tensor, weight_sums: Tensor, last_prototypes: Tensor, rate: float
) -> None:
    """Move ``prototypes`` by ``rate`` of the way to ``sums / weight_sums``, and forget those sums.

    It does so only if an optimizer has moved the prototypes: if they differ from ``last_prototypes``. A single
    prototype moves in any case: its prototype loss has no gradient, so no optimizer moves it.

    Args:
        prototypes: (K, D), moved in place.
        sums: (K, D), weighted sums of the latents that were recorded since the last move; zeroed in place.
        weight_sums: (K,), the sums of their weights; zeroed in place.
        last_prototypes: (K, D), set in place to where the prototypes are now. If it is the wider of the two it keeps
            all digits.
    """
    there = prototypes != last_prototypes.to(prototypes.dtype)
    moved = there.any() | (prototypes.shape[0] == 1)
    position = torch.where(there, prototypes.to(last_prototypes.dtype), last_prototypes)
    weighed = weight_sums >= torch.finfo(weight_sums.dtype).tiny  # less has no digits: latents out of all proportion
    way = sums / torch.where(weighed, weight_sums, 1.0)[:, None] - position
    way = torch.where(moved & weighed[:, None], way, 0.0)
    last_prototypes.copy_(position.add(way, alpha=rate))
    prototypes.copy_(last_prototypes)
    sums.copy_(torch.where(moved, 0.0, sums))
    weight_sums.copy_(torch.where(moved, 0.0, weight_sums))


def followed(prototype_loss: Tensor, shares: Tensor | None, mask: Tensor | None) -> Tensor:
    """(N,) or () bool: which latents of a step the prototypes follow.

    They follow none if the share of the prototype loss is 0 (``shares``, see :func:`~.layer_ops.times_share`). They
    follow none if the loss is NaN: NaN codes do not say which prototype a latent belongs to. Otherwise they follow the
    latents of ``mask`` (N,).
    """
    counted = prototype_loss.isfinite()
    if shares is not None:
        counted = counted & (layer_ops.share_of(shares, 0) > 0)
    return counted if mask is None else mask & counted


def follow(prototypes: Tensor, sums: Tensor, weight_sums: Tensor, last_prototypes: Tensor, rate: float) -> None:
    """:func:`follow_reference` as an operator, compiled where it can be."""
    contiguous = prototypes.is_contiguous() and sums.is_contiguous() and last_prototypes.is_contiguous()
    single = contiguous and layer_ops.compiled(prototypes, sums, last_prototypes)
    operator = torch.ops.proto_reg.follow_float32 if single else torch.ops.proto_reg.follow
    operator.default(prototypes, sums, weight_sums, last_prototypes, rate)


def _fake(prototypes: Tensor, sums: Tensor, weight_sums: Tensor, last_prototypes: Tensor, rate: float) -> None:
    return None


_SCHEMA = (
    "(Tensor(a!) prototypes, Tensor(b!) sums, Tensor(c!) weight_sums, Tensor(d!) last_prototypes, float rate) -> ()"
)
for _name in ("follow", "follow_float32"):  # only the second has a compiled kernel
    torch.library.define(f"proto_reg::{_name}", _SCHEMA)
    torch.library.impl(f"proto_reg::{_name}", "CompositeExplicitAutograd")(follow_reference)
    torch.library.register_fake(f"proto_reg::{_name}")(_fake)
