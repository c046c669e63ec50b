"""What the layer computed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RegularizerOutput(NamedTuple):
    """What the layer computed; positions follow the layout of the latents.

    Attributes:
        loss: () prototype_weight * prototype_loss + mmd_weight * mmd_loss; 0 during warm-up. Differentiable in
            ``mode="weighted"`` only.
        prototype_loss: () cross-entropy of eq. 10.
        mmd_loss: () anchored MMD of eq. 5.
        scores: (B, K), or the layout with K in the place of D.
        codes: like ``scores``; K entries of each position sum to 1.
        assignments: (B,) int64, or the layout without D: argmax of the codes in training, of the scores in eval.
    """

    loss: Tensor
    prototype_loss: Tensor
    mmd_loss: Tensor
    scores: Tensor
    codes: Tensor
    assignments: Tensor
