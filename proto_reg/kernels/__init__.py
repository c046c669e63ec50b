"""Private: the operators behind ``proto_reg.functional``.

Each is registered with ``torch.library`` (schema, fake, autograd). Its plain-torch reference is the implementation on
every device until a compiled one is registered behind the same name; ``backends`` says which one computes a call, and
``build`` compiles it.
"""

from __future__ import annotations

from . import (
    backends,
    first_order,
    follow,
    layer_ops,
    mmd,
    scores,
    sinkhorn,
    sinkhorn_differentiable,
    sinkhorn_distributed,
    sinkhorn_observed,
    sinkhorn_reference,
    snapshot,
    step,
)

__all__ = [
    "backends",
    "first_order",
    "follow",
    "layer_ops",
    "mmd",
    "scores",
    "sinkhorn",
    "sinkhorn_differentiable",
    "sinkhorn_distributed",
    "sinkhorn_observed",
    "sinkhorn_reference",
    "snapshot",
    "step",
]
