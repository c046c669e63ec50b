"""The mathematics as functions. The modules of ``proto_reg`` add state to them."""

from __future__ import annotations

from .metrics import latent_metrics
from .mmd import anchored_mmd
from .noise import with_noise
from .prototypes import prototype_cross_entropy, prototype_scores
from .sinkhorn import sinkhorn, sinkhorn_cross_entropy, sinkhorn_cross_entropy_and_gradient

__all__ = [
    "anchored_mmd",
    "latent_metrics",
    "prototype_cross_entropy",
    "prototype_scores",
    "sinkhorn",
    "sinkhorn_cross_entropy",
    "sinkhorn_cross_entropy_and_gradient",
    "with_noise",
]
