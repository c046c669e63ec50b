"""Balanced assignment by entropic optimal transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from .. import kernels  # noqa: F401  (registers torch.ops.proto_reg)
from .._checks import check_choice, check_mask, check_matrix, check_number, check_positive_int

NAN_POLICIES = ("propagate", "isolate", "raise")
BACKENDS = ("auto", "torch")


@overload
def sinkhorn(
    scores: Tensor,
    epsilon: float = ...,
    num_iters: int = ...,
    *,
    tol: float | None = ...,
    marginals: Tensor | Sequence[float] | None = ...,
    mask: Tensor | None = ...,
    nan_policy: str = ...,
    backend: str = ...,
    return_potentials: Literal[False] = ...,
) -> Tensor: ...
@overload
def sinkhorn(
    scores: Tensor,
    epsilon: float = ...,
    num_iters: int = ...,
    *,
    tol: float | None = ...,
    marginals: Tensor | Sequence[float] | None = ...,
    mask: Tensor | None = ...,
    nan_policy: str = ...,
    backend: str = ...,
    return_potentials: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def sinkhorn(
    scores: Tensor,
    epsilon: float = 0.05,
    num_iters: int = 3,
    *,
    tol: float | None = None,
    marginals: Tensor | Sequence[float] | None = None,
    mask: Tensor | None = None,
    nan_policy: str = "propagate",
    backend: str = "auto",
    return_potentials: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Codes Q that maximise Tr(Q^T S) + eps h(Q) with balanced columns (paper, eq. 11 and 12), times B.

    With uniform marginals this is the iterate of SwAV and DINO after ``num_iters`` iterations, not only its limit,
    computed so that no finite score overflows or underflows. Arithmetic is float32, or float64 for float64 scores.

    Args:
        scores: (B, K) similarities of B latents to K prototypes, any float dtype. K > B is legitimate.
        epsilon: entropic regularisation, > 0, in units of the scores: smaller means harder codes.
        num_iters: Sinkhorn iterations, >= 1; the most of them where ``tol`` is given.
        tol: stop once every column is within this relative error of its marginal; tested on the tensor's device.
        marginals: (K,) share of the batch that each prototype gets, >= 0 and summing to 1; 1/K each by default.
        mask: (B,) bool, True = the row counts. Rows left out get codes but do not weigh in the balance.
        nan_policy: what a NaN, a +inf or a row of nothing but -inf does. ``"propagate"``: it reaches every code, as in
            plain torch.
            ``"isolate"``: its row gets NaN codes, the others are as if it were absent. ``"raise"``: a ValueError; the
            only choice that waits for the device, and so not for torch.compile. A column of -inf is no error: that
            prototype gets nothing.
        backend: ``"torch"``, or ``"auto"`` for the fastest that can run.
        return_potentials: also return g (K,), with which ``softmax(S / eps + g)`` assigns new latents.

    Returns:
        Codes (B, K) in the dtype of ``scores``; every row sums to 1; no gradient flows through them.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size or value, named.
    """
    check_matrix("scores", scores, axes="(B, K)")
    check_number("epsilon", epsilon, above=0)
    check_positive_int("num_iters", num_iters)
    if tol is not None:
        check_number("tol", tol, above=0)
    check_choice("nan_policy", nan_policy, NAN_POLICIES)
    check_choice("backend", backend, BACKENDS)
    check_mask("mask", mask, (scores.shape[0],))
    if marginals is not None and not isinstance(marginals, Tensor):
        marginals = as_marginals(marginals)
    if marginals is not None:
        check_marginals(marginals, scores.shape[1], values=marginals.device.type == "cpu")
        marginals = marginals.to(scores.device)
    if nan_policy == "raise":
        check_no_nan("scores", scores)
    codes, potentials = torch.ops.proto_reg.sinkhorn(
        scores.detach(), marginals, mask, epsilon, num_iters, tol, nan_policy == "isolate"
    )
    return (codes, potentials) if return_potentials else codes


def as_marginals(marginals: Tensor | Sequence[float]) -> Tensor:
    """A tensor of its own, float64 unless it was one already. Raises TypeError for what is no sequence of numbers."""
    if isinstance(marginals, Tensor) and marginals.is_floating_point():
        return marginals.detach().clone()
    try:
        return torch.tensor([float(share) for share in marginals], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"marginals: expected K numbers or a floating-point tensor (K,), got {type(marginals).__name__}. Pass a "
            "list of shares."
        ) from error


def check_marginals(marginals: Tensor, num_prototypes: int | None, *, values: bool = True) -> None:
    """ValueError unless ``marginals`` is a (K,) distribution; ``values=False`` looks at the shape alone."""
    if marginals.ndim != 1 or (num_prototypes is not None and len(marginals) != num_prototypes):
        expected = "(K,)" if num_prototypes is None else f"({num_prototypes},), one share for each prototype"
        raise ValueError(
            f"marginals: expected shape {expected}, got {tuple(marginals.shape)}. Pass one share for each."
        )
    if not values or torch.compiler.is_compiling():
        return
    total = marginals.double().sum().item()
    if not bool((marginals >= 0).all()) or not abs(total - 1) <= (1e-3 if marginals.dtype.itemsize >= 4 else 2e-2):
        raise ValueError(
            f"marginals: expected non-negative shares that sum to 1, got minimum {marginals.min().item():.6g} and sum "
            f"{total:.6g}. Divide them by their sum."
        )


def check_no_nan(name: str, value: Tensor) -> None:
    """ValueError if a row of ``value`` holds a NaN or +inf, or only -inf. Reads one number from the device."""
    bad = (value.isnan() | (value == torch.inf)).any(1) | (value == -torch.inf).all(1)
    if bool(bad.any()):
        raise ValueError(
            f"{name}: expected no NaN, no +inf and no row of only -inf, got {int(bad.sum())} rows that hold one "
            f"(first: row {int(bad.int().argmax())}). Look for the overflow upstream, or use nan_policy='isolate' to "
            "go on without those rows."
        )
