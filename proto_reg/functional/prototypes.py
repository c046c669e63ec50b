"""Scores of latents against prototypes, and the cross-entropy that moves both."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_choice, check_mask, check_matrix, check_number, compute_dtype
from ..kernels.rows import unit_rows, unit_rows_plain, unit_rows_pull_back

SCORES = ("cosine", "dot", "euclidean")


def prototype_scores(z: Tensor, prototypes: Tensor, scores: str = "cosine") -> Tensor:
    """Similarity of every latent to every prototype.

    ``"cosine"``: z.v / (|z| |v|), as SwAV.  ``"dot"``: z.v (paper, eq. 10).  ``"euclidean"``: z.v - |v|^2 / 2, the
    log-posterior of the mixture of N(v_k, I) up to a term that depends on z alone.

    Args:
        z: (..., D); prototypes: (K, D). Of two dtypes the wider one is taken.

    Returns:
        (..., K)

    Raises:
        ValueError: an unknown ``scores``.
    """
    check_choice("scores", scores, SCORES)
    dtype = torch.promote_types(z.dtype, prototypes.dtype)
    z, prototypes = z.to(dtype), prototypes.to(dtype)
    if scores == "cosine":
        return F.linear(unit_rows_plain(z)[0], unit_rows_plain(prototypes)[0])
    if scores == "dot":
        return F.linear(z, prototypes)
    return F.linear(z, prototypes, -0.5 * prototypes.square().sum(-1))


@torch.no_grad()
def prototype_scores_and_pull_back(
    z: Tensor, prototypes: Tensor, scores: str = "cosine"
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """:func:`prototype_scores` (N, K) of ``z`` (N, D), and a function from the gradient by them to those by both."""
    if scores != "cosine":

        def pull_back(by_scores: Tensor) -> tuple[Tensor, Tensor]:
            by_prototypes = by_scores.mT @ z
            if scores == "euclidean":
                by_prototypes = by_prototypes - by_scores.sum(0)[:, None] * prototypes
            return by_scores @ prototypes, by_prototypes

        return prototype_scores(z, prototypes, scores), pull_back
    (unit_z, of_z), (unit_v, of_v) = unit_rows(z), unit_rows(prototypes)

    def pull_back_cosine(by_scores: Tensor) -> tuple[Tensor, Tensor]:
        by_z = unit_rows_pull_back(by_scores @ unit_v, unit_z, of_z)
        return by_z, unit_rows_pull_back(by_scores.mT @ unit_z, unit_v, of_v)

    return F.linear(unit_z, unit_v), pull_back_cosine


def prototype_cross_entropy(
    scores: Tensor, codes: Tensor, temperature: float = 0.1, *, mask: Tensor | None = None
) -> Tensor:
    """-(1/B) sum_i sum_k q_ik log softmax_k(S_i / tau) (paper, eq. 10).

    Args:
        scores: (B, K), differentiable.
        codes: (B, K) targets, rows summing to 1; no gradient flows through them.
        temperature: tau, > 0.
        mask: (B,) bool, True = the row counts; the mean is over those rows.

    Returns:
        A scalar, float32 or float64; its gradient by the scores is (p - q) / (tau B).

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size or value, named.
    """
    check_matrix("scores", scores, axes="(B, K)")
    check_matrix("codes", codes, scores.shape[1], axes="(B, K)")
    if codes.shape[0] != scores.shape[0]:
        raise ValueError(
            f"codes: expected {scores.shape[0]} rows, one for each row of scores, got {codes.shape[0]}. "
            "Assign the same batch that is scored."
        )
    check_number("temperature", temperature, above=0)
    check_mask("mask", mask, (scores.shape[0],))
    dtype = compute_dtype(scores.dtype)
    codes, scores = codes.detach().to(dtype), scores.to(dtype)
    if mask is not None:
        # Before the product: a NaN that is only masked after it would still reach the gradient.
        codes, scores = (torch.where(mask[:, None], x, 0.0) for x in (codes, scores))
    total = -(codes * (scores / temperature).log_softmax(1)).sum()
    return total / (len(scores) if mask is None else mask.sum().clamp_min(1))


@torch.no_grad()
def prototype_cross_entropy_and_gradient(
    scores: Tensor, codes: Tensor, temperature: float = 0.1, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`prototype_cross_entropy` and its gradient by ``scores`` (B, K), in closed form: no graph is built."""
    loss = prototype_cross_entropy(scores, codes, temperature, mask=mask)
    gradient = (scores.to(loss.dtype) / temperature).softmax(1) - codes
    if mask is None:
        return loss, gradient / (temperature * len(scores))
    return loss, torch.where(mask[:, None], gradient, 0.0) / (temperature * mask.sum().clamp_min(1))
