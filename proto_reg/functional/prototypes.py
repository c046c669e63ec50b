"""Scores of latents against prototypes, and the cross-entropy that moves both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_choice, check_floating, check_mask, check_matrix, check_number, compute_dtype
from .._distributed import Group, resolve, size, sum_
from ..kernels.scores import SIMILARITIES, scores_reference
from ..kernels.sinkhorn_reference import away_from_codes, cross_entropies, log_probabilities

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def prototype_scores(z: Tensor, prototypes: Tensor, similarity: str = "cosine", *, std: float = 1.0) -> Tensor:
    """Similarity of every latent to every prototype.

    ``"cosine"``: z.v / (|z| |v|), as SwAV.  ``"dot"``: z.v (paper, eq. 10).  ``"euclidean"``: z.v - |v|^2 / 2, the
    log-posterior of the mixture of N(v_k, I) up to a term that depends on z alone. The last two use z / std and v /
    std: then it is the log-posterior for N(v_k, std^2 I).

    Args:
        z: (..., D) latents.
        prototypes: (K, D). The result has the wider of the two dtypes.
        std: standard deviation of the normal distribution around each prototype, > 0.

    Returns:
        (..., K)

    Raises:
        TypeError, ValueError: an unknown ``similarity``, a ``std`` that is no number > 0, or integers.
    """
    check_floating("z", z)
    check_floating("prototypes", prototypes)
    check_choice("similarity", similarity, SIMILARITIES)
    check_number("std", std, above=0)
    dtype = torch.promote_types(z.dtype, prototypes.dtype)
    z, prototypes = z.to(dtype), prototypes.to(dtype)
    return scores_reference(z, prototypes, similarity, std)


def prototype_cross_entropy(
    scores: Tensor, codes: Tensor, temperature: float = 0.1, *, mask: Tensor | None = None, group: Group = None
) -> Tensor:
    """-(1/B) sum_i sum_k q_ik log softmax_k(S_i / tau) (paper, eq. 10).

    Args:
        scores: (B, K), differentiable.
        codes: (B, K) targets whose rows sum to 1. No gradient flows through them.
        temperature: tau, > 0.
        mask: (B,) bool, True where a row counts. The mean is over those rows.
        group: a ProcessGroup, or ``"default"``: the rows of all its ranks are one batch; B may differ and be 0. The
            loss is that of the whole batch, equal on every rank. Gradients are those of this rank's rows; their average
            over the ranks is the gradient of the whole.

    Returns:
        A scalar, float32 or float64. Its gradient by the scores is (p - q) / (tau B).

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size or value, named.
    """
    return _loss_and_count(scores, codes, temperature, mask, resolve(group))[0]


def _loss_and_count(
    scores: Tensor, codes: Tensor, temperature: float, mask: Tensor | None, ranks: ProcessGroup | None
) -> tuple[Tensor, Tensor | int]:
    """:func:`prototype_cross_entropy`, and the number of rows in its mean."""
    check_matrix("scores", scores, axes="(B, K)", empty=ranks is not None)
    check_matrix("codes", codes, scores.shape[1], axes="(B, K)", empty=ranks is not None)
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
        # Mask before the product: otherwise a NaN reaches the gradient.
        codes, scores = (torch.where(mask[:, None], x, 0.0) for x in (codes, scores))
    total = cross_entropies(log_probabilities(scores, temperature), codes).sum()
    if ranks is None:
        rows = scores.shape[0] if mask is None else mask.sum().clamp_min(1)
        return total / rows, rows
    count = total.new_full((), scores.shape[0]) if mask is None else mask.sum().to(total)
    whole, count = sum_(torch.stack([total.detach(), count]), ranks)
    count = count.clamp_min(1)
    # The value is that of all ranks, the slope that of this one.
    return whole / count + (total - total.detach()) * (size(ranks) / count), count


@torch.no_grad()
def prototype_cross_entropy_and_gradient(
    scores: Tensor, codes: Tensor, temperature: float = 0.1, *, mask: Tensor | None = None, group: Group = None
) -> tuple[Tensor, Tensor]:
    """:func:`prototype_cross_entropy` and its gradient by ``scores`` (B, K), in closed form: no graph is built."""
    ranks = resolve(group)
    loss, count = _loss_and_count(scores, codes, temperature, mask, ranks)
    gradient = away_from_codes(log_probabilities(scores.to(loss.dtype), temperature).exp(), codes)
    gradient = gradient if mask is None else torch.where(mask[:, None], gradient, 0.0)
    return loss, gradient * (size(ranks) / (temperature * count))
