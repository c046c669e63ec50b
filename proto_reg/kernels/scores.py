"""Scores of latents against prototypes in plain torch, and their gradients in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer_ops import unit_rows, unit_rows_pull_back, unit_rows_reference

SIMILARITIES = ("cosine", "dot", "euclidean")


def scores_reference(z: Tensor, prototypes: Tensor, similarity: str, std: float = 1.0) -> Tensor:
    """Scores (..., K) of ``z`` (..., D) against ``prototypes`` (K, D), differentiable.

    ``similarity``: one of ``SIMILARITIES``. "dot" and "euclidean" take both in units of ``std``; the cosine has no
    units.
    """
    if similarity == "cosine":
        return F.linear(unit_rows_reference(z)[0], unit_rows_reference(prototypes)[0])
    if std != 1:
        z, prototypes = z / std, prototypes / std
    if similarity == "dot":
        return F.linear(z, prototypes)
    return F.linear(z, prototypes, -0.5 * prototypes.square().sum(-1))


@torch.no_grad()
def scores_and_pull_back(
    z: Tensor, prototypes: Tensor, similarity: str, std: float = 1.0
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Scores (N, K) of ``z`` (N, D), and a function from the gradient by them to those by ``z`` and ``prototypes``."""
    if similarity != "cosine":

        def pull_back(by_scores: Tensor) -> tuple[Tensor, Tensor]:
            by_scores = by_scores if std == 1 else by_scores / std**2
            by_prototypes = by_scores.mT @ z
            if similarity == "euclidean":
                by_prototypes = by_prototypes - by_scores.sum(0)[:, None] * prototypes
            return by_scores @ prototypes, by_prototypes

        return scores_reference(z, prototypes, similarity, std), pull_back
    (unit_z, of_z), (unit_v, of_v) = unit_rows(z), unit_rows(prototypes)

    def pull_back_cosine(by_scores: Tensor) -> tuple[Tensor, Tensor]:
        by_z = unit_rows_pull_back(by_scores @ unit_v, unit_z, of_z)
        return by_z, unit_rows_pull_back(by_scores.mT @ unit_z, unit_v, of_v)

    return F.linear(unit_z, unit_v), pull_back_cosine
