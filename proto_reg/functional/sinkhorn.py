"""Balanced assignment by entropic optimal transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import kernels
from .._checks import check_floating, check_number
from .._distributed import Group, resolve, size, with_gradients
from .sinkhorn_arguments import SinkhornKeywords, SinkhornOptions, operator_arguments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BACKENDS = kernels.backends.NAMES

_sinkhorn = torch.ops.proto_reg.sinkhorn.default
_sinkhorn_codes = torch.ops.proto_reg.sinkhorn_codes.default
# The same without a Python call in between, if torch offers it.
_sinkhorn_codes_now = getattr(_sinkhorn_codes, "_op", _sinkhorn_codes)
_sinkhorn_out = torch.ops.proto_reg.sinkhorn_out.default


@overload
def sinkhorn(
    scores: Tensor,
    epsilon: float = ...,
    num_iters: int = ...,
    *,
    hard: bool = ...,
    differentiable: bool = ...,
    out: Tensor | None = ...,
    group: Group = ...,
    return_potentials: Literal[False] = ...,
    **options: Unpack[SinkhornKeywords],
) -> Tensor: ...
@overload
def sinkhorn(
    scores: Tensor,
    epsilon: float = ...,
    num_iters: int = ...,
    *,
    hard: bool = ...,
    differentiable: bool = ...,
    out: Tensor | None = ...,
    group: Group = ...,
    return_potentials: Literal[True],
    **options: Unpack[SinkhornKeywords],
) -> tuple[Tensor, Tensor]: ...
def sinkhorn(
    scores: Tensor,
    epsilon: float = 0.05,
    num_iters: int = 3,
    *,
    tol: float | None = None,
    marginals: Tensor | Sequence[float] | None = None,
    prototype_mask: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    nan_policy: str = "propagate",
    hard: bool = False,
    differentiable: bool = False,
    backend: str = "auto",
    out: Tensor | None = None,
    group: Group = None,
    return_potentials: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Codes Q that maximise Tr(Q^T S) + eps h(Q) with balanced columns (paper, eq. 11 and 12), times B.

    With uniform marginals this is the iterate of SwAV and DINO after ``num_iters`` iterations, not only the same limit.
    No finite score overflows or underflows. Arithmetic is float32, or float64 for float64 scores.

    Args:
        scores: (B, K) similarities of B latents to K prototypes, in float16, bfloat16, float32 or float64. Leading
            axes hold separate problems, for example heads: (G, B, K), (A, G, B, K). K may exceed B.
        epsilon: entropic regularisation, > 0, in units of the scores: smaller means harder codes.
        num_iters: Sinkhorn iterations, >= 1. With ``tol`` it is their maximum.
        tol: stop as soon as every column is within this relative error of its marginal. The test runs on the tensor's
            device. Float32 can tell 2e-6 at least, and K / 2e9 from K = 4,096 on; a smaller tol is raised to that, with
            a warning. With scores of more than 16 epsilon plain torch may stop earlier, at an error of 1e-7 times the
            largest potential; on the CPU a warning says so.
        marginals: (K,) or (..., K) share of the batch that each prototype gets, >= 0, sum 1; 1/K by default.
        prototype_mask: (K,) or (..., K) bool, True where a prototype takes part. The others get nothing, and their
            scores may be anything, even NaN.
        mask: (..., B) bool, True where a row counts. The other rows get codes but have no weight in the balance.
        weights: (..., B) >= 0: a row of weight 2 counts as two rows.
        nan_policy: what happens to a row that counts and holds a NaN, a +inf, or nothing but -inf at the prototypes
            with a share. ``"propagate"``: all codes become NaN, as in plain torch. ``"isolate"``: its own codes become
            NaN, and the other rows are as if it were absent. ``"raise"``: a ValueError. This choice waits for the
            device, so torch.compile cannot use it. A column of -inf is no error: that prototype gets nothing.
        hard: 1 for the largest code of each row, 0 for the others.
        differentiable: gradients flow through the iterations to scores, marginals and weights, in plain torch.
            Otherwise codes are constants. A marginal or weight of 0 has a gradient of 0.
        backend: ``"torch"``, ``"cpu"``, ``"cuda"``, ``"triton"``, or ``"auto"`` for the fastest that can run
            (``python -m proto_reg backends`` lists them).
        out: contiguous tensor like ``scores`` that receives the codes and is returned.
        group: a ProcessGroup, or ``"default"``: the rows of all its ranks are balanced as one batch, in plain torch. It
            takes ``num_iters`` + 1 all-reduces of K numbers, and one of 1 with ``weights``. B may differ and be 0. All
            ranks must call with the same options, ``marginals`` and ``prototype_mask``.
        return_potentials: also return g, (K,) or (..., K). Then ``softmax(S / eps + g)`` assigns new latents.

    Returns:
        Codes like ``scores``. Every row sums to 1. No gradient flows through them unless ``differentiable``.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size or value, named.
        RuntimeError: a forced backend that is not built, with every reason.
    """
    if (ranks := None if group is None else resolve(group)) is not None:
        _check_grouped(ranks, backend, differentiable)
    # The entries of SinkhornOptions as a plain tuple: the named one takes as long as a tenth of a small problem.
    options: Any = (epsilon, num_iters, tol, marginals, prototype_mask, mask, weights, nan_policy, backend)
    given, (scores, arguments) = scores, operator_arguments(scores, options, ranks, differentiable=differentiable)
    solve: Callable[..., tuple[Tensor, Tensor]]
    if ranks is not None:
        solve = partial(kernels.sinkhorn_distributed.sinkhorn_over_group, ranks)
    elif differentiable:
        if backend not in ("auto", "torch"):
            raise ValueError(
                f"backend: expected 'auto' or 'torch' with differentiable=True, got {backend!r}. Only plain torch "
                "keeps a graph."
            )
        if out is not None or hard:
            raise ValueError(
                "differentiable: expected False with out= or hard=True, got True. Gradients need codes of their own."
            )
        solve = kernels.sinkhorn_reference.differentiable_sinkhorn
    elif kernels.backends.choose(backend, scores) == "torch":
        solve = partial(kernels.sinkhorn_reference.sinkhorn_reference, with_potentials=return_potentials)
        scores = scores.detach() if scores.requires_grad else scores
    elif out is None and not return_potentials:
        # Without potentials and unused arguments: on a small problem they take as long as the problem.
        target, row_weights, _, _, least, isolate = arguments
        if target is None and row_weights is None and least is None and not isolate:
            operator = _sinkhorn_codes if torch.compiler.is_compiling() else _sinkhorn_codes_now
            codes = operator(scores, epsilon, num_iters)
        else:
            codes = _sinkhorn_codes(scores, epsilon, num_iters, target, row_weights, least, isolate)
        codes = codes if given.ndim < 4 else codes.reshape(given.shape)
        return _hardened(codes) if hard else codes
    else:
        solve = _sinkhorn
    codes, potentials = solve(scores, *arguments) if out is None else _into(out, given, solve, scores, *arguments)
    if given.ndim > 3:
        codes = codes.reshape(given.shape)
        potentials = potentials.unflatten(0, given.shape[:-2]) if return_potentials else None
    codes = codes if out is None else out
    if hard:
        _hardened(codes)
    return (codes, potentials) if return_potentials else codes


def sinkhorn_cross_entropy(
    scores: Tensor,
    epsilon: float = 0.05,
    num_iters: int = 3,
    temperature: float = 0.1,
    *,
    group: Group = None,
    return_codes: bool = False,
    **options: Unpack[SinkhornKeywords],
) -> Tensor | tuple[Tensor, Tensor]:
    """``prototype_cross_entropy(scores, sinkhorn(scores), temperature)`` in one pass over the scores.

    The last Sinkhorn iteration gives loss and gradient together: -(1/W) sum_i w_i sum_k q_ik log p_ik with
    p = softmax(S / tau) (paper, eq. 10), and ``w_i (p - q) / (tau W)``. W is the sum of the weights. A prototype that
    ``prototype_mask`` leaves out is in neither softmax: the loss is that of the scores without its column.

    Args:
        scores: (B, K), differentiable. Nothing else is.
        temperature: tau, > 0.
        return_codes: also return the codes (B, K), which carry no gradient.
        group: the rows of all its ranks are one batch, see :func:`sinkhorn`. The loss is that of the whole
            batch, equal on every rank. Gradients are those of this rank's rows; their average over the ranks is the
            gradient of the whole.
        epsilon, num_iters, tol, marginals, prototype_mask, mask, weights, nan_policy, backend: see :func:`sinkhorn`.

    Returns:
        The loss, a scalar.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size or value, named.
        RuntimeError: a forced backend that is not built, with every reason.
    """
    given = SinkhornOptions(epsilon, num_iters, **options)
    if isinstance(given.weights, Tensor) and given.weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weights: expected a tensor without gradient, got requires_grad=True. Nothing flows back to weights here: "
            "pass weights.detach(), or weigh the rows' losses yourself."
        )
    if (ranks := resolve(group)) is not None:
        loss, gradient, codes = sinkhorn_cross_entropy_and_gradient(
            scores.detach(), epsilon, num_iters, temperature, group=ranks, **options
        )
        loss = with_gradients(loss, [scores], [gradient])
        return (loss, codes) if return_codes else loss
    plain, temperature = _cross_entropy_options(scores, temperature, given.backend)
    scores, arguments = operator_arguments(scores, given, entropy=True)
    if kernels.first_order.transforming():
        reference = kernels.sinkhorn_reference.sinkhorn_cross_entropy_reference
        loss, _, _, codes = reference(scores, *arguments, temperature, return_codes)
        return (loss, codes.detach()) if return_codes else loss
    loss, _, _, codes = kernels.sinkhorn.CrossEntropy.apply(plain, scores, *arguments, temperature, return_codes)
    return (loss, codes) if return_codes else loss


def sinkhorn_cross_entropy_and_gradient(
    scores: Tensor,
    epsilon: float = 0.05,
    num_iters: int = 3,
    temperature: float = 0.1,
    *,
    group: Group = None,
    **options: Unpack[SinkhornKeywords],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and codes of :func:`sinkhorn_cross_entropy` at once, for a backward pass of your own.

    No graph is built. Arguments and errors are the same.

    Returns:
        loss: ()
        gradient: (B, K) by ``scores``, in their dtype.
        codes: (B, K)
    """
    given, ranks = SinkhornOptions(epsilon, num_iters, **options), resolve(group)
    _check_grouped(ranks, given.backend)
    plain, temperature = _cross_entropy_options(scores, temperature, given.backend)
    scores, arguments = operator_arguments(scores, given, ranks, entropy=True)
    if ranks is not None:
        return kernels.sinkhorn_distributed.cross_entropy_over_group(ranks, scores, *arguments, temperature)
    loss, gradient, _, codes = kernels.sinkhorn.cross_entropy_without_graph(
        plain, scores, *arguments, temperature, True
    )
    return loss, gradient, codes


def _check_grouped(ranks: ProcessGroup | None, backend: str, differentiable: bool = False) -> None:
    """ValueError for what only one process can do."""
    if ranks is not None and (differentiable or backend not in ("auto", "torch")):
        wanted = "differentiable=True" if differentiable else f"backend={backend!r}"
        raise ValueError(
            f"group: expected None with {wanted}, got a group of {size(ranks)} processes. Across processes plain torch "
            "computes, without a graph."
        )


def _cross_entropy_options(scores: Tensor, temperature: float, backend: str) -> tuple[bool, float]:
    """Whether plain torch computes it, and the temperature, checked."""
    check_floating("scores", scores)
    if scores.ndim != 2:
        raise ValueError(f"scores: expected (B, K), got {tuple(scores.shape)}. Take the groups one by one.")
    temperature = check_number("temperature", temperature, above=0)
    return kernels.backends.choose(backend, scores) == "torch", temperature


def _hardened(codes: Tensor) -> Tensor:
    """1 for the largest code of each row, 0 for the others, NaN for undefined rows; in place."""
    undefined = codes.isnan().any(-1, keepdim=True)
    largest = codes.argmax(-1, keepdim=True)
    return codes.zero_().scatter_(-1, largest, 1.0).masked_fill_(undefined, torch.nan)


def _into(out: Tensor, given: Tensor, solve, scores: Tensor, *options) -> tuple[Tensor, Tensor]:
    """Write the codes of ``solve`` into ``out``, which is like the ``given`` scores."""
    fits = isinstance(out, Tensor) and (out.shape, out.dtype, out.device) == (given.shape, given.dtype, given.device)
    if not fits or not out.is_contiguous() or out.requires_grad:
        came = type(out).__name__
        if isinstance(out, Tensor):
            strides = "" if out.is_contiguous() else ", not contiguous"
            came = f"{tuple(out.shape)} {out.dtype} on {out.device}{strides}"
            came += ", requiring a gradient" if out.requires_grad else ""
        raise ValueError(
            f"out: expected a contiguous tensor like scores, {tuple(given.shape)} {given.dtype} on {given.device}, "
            f"without gradient, got {came}. Allocate it with torch.empty_like(scores)."
        )
    # Memory has no address while a graph is traced.
    traced = torch.compiler.is_compiling()
    if not traced and out.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
        raise ValueError(
            "out: expected memory of its own, got that of scores. Allocate it with torch.empty_like(scores)."
        )
    flat = out.view(scores.shape)
    if solve is _sinkhorn:
        return flat, _sinkhorn_out(scores, *options, flat)
    codes, potentials = solve(scores, *options)
    return flat.copy_(codes), potentials
