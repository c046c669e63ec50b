"""Checks the arguments of the Sinkhorn functions, and brings them into the operators' form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, TypedDict, cast

import torch
from torch import Tensor

from .._checks import (
    DTYPES,
    check_choice,
    check_floating,
    check_mask,
    check_number,
    check_positive_int,
    compute_dtype,
    warn,
)
from .._distributed import max_, size, sum_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NAN_POLICIES = ("propagate", "isolate", "raise")
IMPLICIT = "implicit"

# Marginals, weights of rows, epsilon, num_iters, tol, isolate.
Arguments: TypeAlias = tuple[Tensor | None, Tensor | None, float, int, float | None, bool]


class SinkhornKeywords(TypedDict, total=False):
    """The keywords that all Sinkhorn functions share; see :func:`proto_reg.functional.sinkhorn`."""

    tol: float | None
    marginals: Tensor | Sequence[float] | None
    prototype_mask: Tensor | None
    mask: Tensor | None
    weights: Tensor | None
    nan_policy: str
    backend: str


class SinkhornOptions(NamedTuple):
    """The options of the Sinkhorn functions; see :func:`proto_reg.functional.sinkhorn`."""

    epsilon: float
    num_iters: int
    tol: float | None = None
    marginals: Tensor | Sequence[float] | None = None
    prototype_mask: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None
    nan_policy: str = "propagate"
    backend: str = "auto"


def operator_arguments(
    scores: Tensor,
    options: SinkhornOptions,
    group: ProcessGroup | None = None,
    *,
    differentiable: bool = False,
    entropy: bool = False,
) -> tuple[Tensor, Arguments]:
    """The scores, (B, K) or (G, B, K), and the other arguments, as ``proto_reg::sinkhorn`` takes them.

    Every call comes through here. Valid arguments pass within a microsecond. In a ``group`` there may be no rows.
    Leading axes become one axis of groups. Marginals and weights keep their graph only if ``differentiable``.
    ``entropy``: the scores also go into a softmax, which ``prototype_mask`` restricts too.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    epsilon, num_iters, tol, marginals, prototype_mask, mask, weights, nan_policy, _ = options
    if not (isinstance(scores, Tensor) and scores.ndim > 1 and scores.numel() and scores.dtype in DTYPES):
        _check_scores(scores, group)
    if not (type(epsilon) is float and 0.0 < epsilon < math.inf):
        epsilon = check_number("epsilon", epsilon, above=0)
    if not (type(num_iters) is int and num_iters > 0):
        check_positive_int("num_iters", num_iters)
    if tol is not None:
        tol = reachable(check_number("tol", tol, above=0), scores.dtype, scores.shape[-1])
    if nan_policy != "propagate":
        check_choice("nan_policy", nan_policy, NAN_POLICIES)
    target = row_weights = None
    if marginals is not None or prototype_mask is not None:
        target = _target(scores, marginals, prototype_mask, differentiable)
        if prototype_mask is not None:
            scores = _overwritten(scores, prototype_mask, target, entropy)
    if mask is not None or weights is not None:
        row_weights = _row_weights(scores, mask, weights, group, differentiable)
    if nan_policy == "raise":
        check_no_nan("scores", scores, group, target, row_weights)
    if scores.ndim > 3:
        scores = scores.flatten(0, -3)
        target = target if target is None or target.ndim == 1 else target.flatten(0, -2)
        row_weights = None if row_weights is None else row_weights.flatten(0, -2)
    return scores, (target, row_weights, epsilon, num_iters, tol, nan_policy == "isolate")


def reachable(tol: float, dtype: torch.dtype, num_prototypes: int) -> float:
    """``tol``, or the least that the dtype of the computation can tell, with a warning."""
    least = least_tol(dtype, num_prototypes)
    if tol >= least:
        return tol
    if not torch.compiler.is_compiling():
        single = compute_dtype(dtype) == torch.float32
        warn(
            f"tol: {tol:.2g} is less than {'float32' if single else 'float64'} can tell with {num_prototypes} "
            f"prototypes: {least:.2g} counts in its place. Pass that or more{', or float64 scores' if single else ''}."
        )
    return least


def least_tol(dtype: torch.dtype, num_prototypes: int) -> float:
    """The least ``tol`` for scores of this dtype.

    Sums of K terms differ by this much from one iteration to the next, however many there are. This was measured on
    every backend, up to K = 300,000.
    """
    return torch.finfo(compute_dtype(dtype)).eps * max(16.0, num_prototypes / 256)


def _check_scores(scores: Tensor, group: ProcessGroup | None) -> None:
    """TypeError or ValueError for wrong scores. In a group a process may have no rows."""
    check_floating("scores", scores)
    shape = tuple(scores.shape)
    if len(shape) < 2:
        raise ValueError(
            f"scores: expected shape (B, K) or (..., B, K), got {shape}. Pass one row of K scores for each latent."
        )
    if 0 in shape and (group is None or 0 in (*shape[:-2], shape[-1])):
        raise ValueError(f"scores: expected a non-empty tensor, got {shape}. Skip empty batches.")


def _target(
    scores: Tensor,
    marginals: Tensor | Sequence[float] | None,
    prototype_mask: Tensor | None,
    differentiable: bool,
) -> Tensor:
    """Column masses (K,) or (..., K) in float32, or float64 for float64 scores, from marginals and mask together."""
    *groups, _, columns = scores.shape
    dtype = compute_dtype(scores.dtype)
    target = None
    if marginals is not None:
        target = marginals if isinstance(marginals, Tensor) else as_marginals(marginals)
        check_marginals(target, columns, groups=groups, values=target.device.type == "cpu")
        target = (target if differentiable else target.detach()).to(scores.device, dtype)
        if prototype_mask is None:
            return target
    shared = not isinstance(prototype_mask, Tensor) or prototype_mask.ndim == 1 or not groups
    shape = (columns,) if shared else (*groups, columns)
    allowed = cast(Tensor, check_mask("prototype_mask", prototype_mask, shape)).to(scores.device, dtype)
    target = allowed if target is None else target * allowed
    total = target.sum(-1, keepdim=True)
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((total > 0).all()):
        raise ValueError(
            "prototype_mask: expected at least one prototype with a marginal above 0, got none. Leave one."
        )
    return target / total


def _overwritten(scores: Tensor, prototype_mask: Tensor, target: Tensor, entropy: bool) -> Tensor:
    """Scores without the old entries of the columns outside ``prototype_mask``, which may be NaN.

    A column of the ``target`` replaces them: infinities would take the kernels off their fast paths. The codes there
    are 0, because the shares are 0. For a softmax -inf replaces them.
    """
    kept = prototype_mask.to(scores.device)
    kept = kept if kept.ndim == 1 else kept.unsqueeze(-2)
    if entropy:
        return scores.masked_fill(~kept, -torch.inf)
    first = (target > 0).to(torch.uint8).argmax(-1, keepdim=True).unsqueeze(-2)
    first = first.expand(*scores.shape[:-2], 1, 1)
    return torch.where(kept, scores, scores.detach().take_along_dim(first, -1))


def _row_weights(
    scores: Tensor, mask: Tensor | None, weights: Tensor | None, group: ProcessGroup | None, differentiable: bool
) -> Tensor | None:
    """Weights (..., B), 0 where the mask is False, in the dtype of the computation."""
    shape = tuple(scores.shape[:-1])
    counted = None if mask is None else check_mask("mask", mask, shape)
    counted = None if counted is None else counted.to(scores.device)
    if weights is None:
        return None if counted is None else counted.to(compute_dtype(scores.dtype))
    check_floating("weights", weights)
    if tuple(weights.shape) != shape:
        raise ValueError(f"weights: expected shape {shape}, one for each row, got {tuple(weights.shape)}. Pass (B,).")
    if weights.numel() and weights.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (float(bound) for bound in weights.detach().aminmax())
        if not (low >= 0 and math.isfinite(high)):
            raise ValueError(
                f"weights: expected finite numbers >= 0, got some between {low:.6g} and {high:.6g}. Use 0 to leave a "
                "row out."
            )
    # Only ratios matter. Weights far from 1 would take sums out of float32's range.
    weights = (weights if differentiable else weights.detach()).to(scores.device, torch.float64)
    weights = weights if counted is None else torch.where(counted, weights, 0.0)
    none = weights.shape[-1] == 0
    top = max_(weights.new_zeros((*weights.shape[:-1], 1)) if none else weights.amax(-1, keepdim=True), group)
    return (weights / torch.where(top > 0, top, 1.0)).to(compute_dtype(scores.dtype))


def check_differentiable(differentiable: bool | Literal["implicit"]) -> bool | Literal["implicit"]:
    """``differentiable``. ValueError unless it is a bool or ``"implicit"``."""
    if differentiable is not False and differentiable is not True and differentiable != IMPLICIT:
        raise ValueError(
            f"differentiable: expected False, True or {IMPLICIT!r}, got {differentiable!r}. True is exact after any "
            "number of iterations."
        )
    return differentiable


def check_grouped(ranks: ProcessGroup | None, backend: str, differentiable: bool | str = False) -> None:
    """ValueError for what only one process can do."""
    if ranks is not None and (differentiable or backend not in ("auto", "torch")):
        wanted = f"differentiable={differentiable!r}" if differentiable else f"backend={backend!r}"
        raise ValueError(
            f"group: expected None with {wanted}, got a group of {size(ranks)} processes. Across processes plain torch "
            "computes, without a graph."
        )


def as_marginals(marginals: Tensor | Sequence[float]) -> Tensor:
    """A new tensor, float64 unless ``marginals`` is a tensor. Raises TypeError unless it is a sequence of numbers."""
    if isinstance(marginals, Tensor) and marginals.is_floating_point():
        return marginals.detach().clone()
    try:
        return torch.tensor([float(share) for share in marginals], dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"marginals: expected K numbers or a floating-point tensor (K,), got {type(marginals).__name__}. Pass a "
            "list of shares."
        ) from error


def check_marginals(
    marginals: Tensor, num_prototypes: int | None, *, groups: Sequence[int] = (), values: bool = True
) -> None:
    """ValueError unless ``marginals`` is a (K,) distribution, or one for each of ``groups``.

    With ``values=False`` it checks the shape only.
    """
    shape = tuple(marginals.shape)
    known = shape[-1] if num_prototypes is None and shape else num_prototypes
    if shape not in ((known,), (*groups, known)):
        expected = "(K,)" if num_prototypes is None else f"({num_prototypes},), one share for each prototype"
        raise ValueError(
            f"marginals: expected shape {expected}, got {tuple(marginals.shape)}. Pass one share for each."
        )
    if not values or torch.compiler.is_compiling():
        return
    totals = marginals.double().sum(-1)
    total = totals.flatten()[(totals - 1).abs().argmax()].item()
    if not bool((marginals >= 0).all()) or not abs(total - 1) <= (1e-3 if marginals.dtype.itemsize >= 4 else 2e-2):
        raise ValueError(
            f"marginals: expected non-negative shares that sum to 1, got minimum {marginals.min().item():.6g} and sum "
            f"{total:.6g}. Divide them by their sum."
        )


def check_no_nan(
    name: str,
    value: Tensor,
    group: ProcessGroup | None = None,
    target: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """ValueError, on all ranks of the group, if a row of ``value`` holds a NaN or +inf, or only -inf on any of them.

    ``target`` (..., K): only columns with a share save a row from being all -inf; None for all. Rows without weight are
    not checked. It reads one number from the device.
    """
    lost = value == -torch.inf
    lost = lost if target is None else lost | (target == 0).unsqueeze(-2)
    bad = (value.isnan() | (value == torch.inf)).any(-1) | lost.all(-1)
    bad = (bad if weights is None else bad & (weights > 0)).flatten()
    count = int(sum_(bad.sum(), group))
    if count:
        where = f"first: row {int(bad.int().argmax())}" if bool(bad.any()) else "all in other processes"
        raise ValueError(
            f"{name}: expected no NaN, no +inf and no row of only -inf, got {count} rows that hold one "
            f"({where}). Look for the overflow upstream, or use nan_policy='isolate' to "
            "go on without those rows."
        )


def usable(rows: Tensor, mask: Tensor | None, nan_policy: str, group: ProcessGroup | None) -> Tensor | None:
    """Which of ``rows`` (N, D) count under a policy other than ``"propagate"``: some of those of ``mask`` (N,).

    Raises:
        ValueError: under ``"raise"``, on all ranks, if a row that counts is not finite.
    """
    if nan_policy == "raise":
        check_no_nan("z", rows if mask is None else rows[mask], group)
        return mask
    finite = rows.isfinite().all(1)
    return finite if mask is None else mask & finite
