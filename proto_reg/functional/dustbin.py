"""Partial matching: rows and columns that have no partner go to a dustbin."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_floating, check_mask, check_number, compute_dtype
from .sinkhorn import sinkhorn


def sinkhorn_with_dustbin(
    scores: Tensor,
    dustbin_score: Tensor | float,
    epsilon: float = 1.0,
    num_iters: int = 100,
    *,
    tol: float | None = None,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
) -> Tensor:
    """Matches of B rows to K columns of which some have no partner (SuperGlue, Sarlin et al. 2020, eq. 8 and 9).

    One row and one column are added, the dustbins. All their scores are ``dustbin_score``. Each row and each column has
    a mass of 1; the dustbin of the columns takes up to B, that of the rows up to K. So every mass finds a place.

    Args:
        scores: (..., B, K). Leading axes hold separate problems.
        dustbin_score: a number, () or a tensor that broadcasts to the leading axes. SuperGlue learns it.
        epsilon: > 0, in units of the scores. SuperGlue has 1.
        num_iters: Sinkhorn iterations, or with ``tol`` their maximum.
        tol: see :func:`sinkhorn`.
        row_mask: (..., B) bool, True where a row takes part. The others match nothing. Their scores may be anything.
        column_mask: (..., K) bool, the same for columns.

    Returns:
        The plan (..., B + 1, K + 1), dustbins last, in the dtype of the scores. Its rows sum to 1, and the last one to
        K (to the number of columns that take part). Columns do so as far as the iterations have converged. Gradients
        flow to scores and ``dustbin_score`` if one of them asks for it.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size or value, named.
    """
    check_floating("scores", scores)
    if scores.ndim < 2:
        raise ValueError(f"scores: expected shape (..., B, K), got {tuple(scores.shape)}. Pass a row for each item.")
    *leading, rows, columns = scores.shape
    row_mask = check_mask("row_mask", row_mask, (*leading, rows))
    column_mask = check_mask("column_mask", column_mask, (*leading, columns))
    masses, shares = _masses(scores, row_mask, column_mask)
    for mask, axis in ((row_mask, -1), (column_mask, -2)):
        scores = scores if mask is None else torch.where(mask.to(scores.device).unsqueeze(axis), scores, 0.0)
    bordered = _bordered(scores, _dustbin(dustbin_score, scores))
    differentiable = torch.is_grad_enabled() and bordered.requires_grad
    marginals = shares / shares.sum(-1, keepdim=True)
    codes = sinkhorn(
        bordered, epsilon, num_iters, tol=tol, marginals=marginals, weights=masses, differentiable=differentiable
    )
    return codes * masses.unsqueeze(-1).to(codes.dtype)


def _masses(scores: Tensor, row_mask: Tensor | None, column_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masses (..., B + 1) of the rows and (..., K + 1) of the columns. A dustbin has room for the whole other side."""
    *leading, count, width = scores.shape
    dtype = compute_dtype(scores.dtype)
    rows, columns = (scores.new_ones((*leading, length), dtype=dtype) for length in (count, width))
    rows = rows if row_mask is None else row_mask.to(rows)
    columns = columns if column_mask is None else column_mask.to(columns)
    rooms = rows.sum(-1, keepdim=True), columns.sum(-1, keepdim=True)
    return torch.cat([rows, rooms[1]], -1), torch.cat([columns, rooms[0]], -1)


def _dustbin(score: Tensor | float, scores: Tensor) -> Tensor:
    """The dustbin's score (..., 1, 1) like ``scores``."""
    leading = scores.shape[:-2]
    if not isinstance(score, Tensor):
        return scores.new_full((*leading, 1, 1), check_number("dustbin_score", score))
    check_floating("dustbin_score", score)
    try:
        return score.to(scores).expand(leading)[..., None, None]
    except RuntimeError as error:
        raise ValueError(
            f"dustbin_score: expected a number or a tensor that broadcasts to {tuple(leading)}, got shape "
            f"{tuple(score.shape)}. Pass one for each problem, or one for all."
        ) from error


def _bordered(scores: Tensor, dustbin: Tensor) -> Tensor:
    """``scores`` (..., B, K) with a last row and a last column of the ``dustbin`` score (..., 1, 1)."""
    *leading, rows, columns = scores.shape
    wider = torch.cat([scores, dustbin.expand(*leading, rows, 1)], -1)
    return torch.cat([wider, dustbin.expand(*leading, 1, columns + 1)], -2)
