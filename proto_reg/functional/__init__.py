"""The mathematics as functions. The modules of ``proto_reg`` add state to them."""

from __future__ import annotations

from .clusters import PrototypeCounts, choose_num_prototypes, nearest_examples, prototype_hierarchy
from .dustbin import sinkhorn_with_dustbin
from .metrics import latent_metrics
from .mmd import anchored_mmd
from .noise import with_noise
from .prototypes import prototype_cross_entropy, prototype_scores
from .sinkhorn import SinkhornInfo, sinkhorn
from .sinkhorn_cross_entropy import sinkhorn_cross_entropy, sinkhorn_cross_entropy_and_gradient

__all__ = [
    "PrototypeCounts",
    "SinkhornInfo",
    "anchored_mmd",
    "choose_num_prototypes",
    "latent_metrics",
    "nearest_examples",
    "prototype_cross_entropy",
    "prototype_hierarchy",
    "prototype_scores",
    "sinkhorn",
    "sinkhorn_cross_entropy",
    "sinkhorn_cross_entropy_and_gradient",
    "sinkhorn_with_dustbin",
    "with_noise",
]
