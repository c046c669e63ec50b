"""Balanced assignment by entropic optimal transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import kernels
from .._checks import check_floating, check_number, compute_dtype
from .._distributed import Group, resolve
from .sinkhorn_arguments import (
    IMPLICIT,
    Arguments,
    SinkhornKeywords,
    check_differentiable,
    check_grouped,
    least_tol,
    operator_arguments,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BACKENDS = kernels.backends.NAMES

_sinkhorn = torch.ops.proto_reg.sinkhorn.default
_sinkhorn_codes = torch.ops.proto_reg.sinkhorn_codes.default
# The same without a Python call in between, if torch offers it.
_sinkhorn_codes_now = getattr(_sinkhorn_codes, "_op", _sinkhorn_codes)
_sinkhorn_out = torch.ops.proto_reg.sinkhorn_out.default


class SinkhornInfo(NamedTuple):
    """How far the iterations of :func:`sinkhorn` came. Tensors on its device, with the leading axes of the scores."""

    iterations: Tensor
    """int64: how many there were."""
    error: Tensor
    """The largest relative error of a column of the codes against its marginal. With ``slack`` it is the largest
    relative change that one more iteration makes to exp(g)."""
    converged: Tensor
    """bool: ``error`` is at most ``tol``, or without that what the dtype can tell."""


class _Keywords(SinkhornKeywords, total=False):
    hard: bool
    differentiable: bool | Literal["implicit"]
    out: Tensor | None
    group: Group
    potentials: Tensor | None
    slack: float | None


@overload
def sinkhorn(
    scores: Tensor,
    epsilon: float = ...,
    num_iters: int = ...,
    *,
    return_potentials: Literal[False] = ...,
    return_info: Literal[False] = ...,
    **options: Unpack[_Keywords],
) -> Tensor: ...
@overload
def sinkhorn(
    scores: Tensor,
    epsilon: float = ...,
    num_iters: int = ...,
    *,
    return_potentials: Literal[True],
    return_info: Literal[False] = ...,
    **options: Unpack[_Keywords],
) -> tuple[Tensor, Tensor]: ...
@overload
def sinkhorn(
    scores: Tensor,
    epsilon: float = ...,
    num_iters: int = ...,
    *,
    return_potentials: Literal[False] = ...,
    return_info: Literal[True],
    **options: Unpack[_Keywords],
) -> tuple[Tensor, SinkhornInfo]: ...
@overload
def sinkhorn(
    scores: Tensor,
    epsilon: float = ...,
    num_iters: int = ...,
    *,
    return_potentials: Literal[True],
    return_info: Literal[True],
    **options: Unpack[_Keywords],
) -> tuple[Tensor, Tensor, SinkhornInfo]: ...
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
    differentiable: bool | Literal["implicit"] = False,
    backend: str = "auto",
    out: Tensor | None = None,
    group: Group = None,
    potentials: Tensor | None = None,
    slack: float | None = None,
    return_potentials: bool = False,
    return_info: bool = False,
) -> Tensor | tuple[Tensor | SinkhornInfo, ...]:
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
        differentiable: gradients flow to scores, marginals and weights. Otherwise codes are constants. True: through
            all iterations, in memory that does not grow with them. With ``slack``, and with ``return_info`` and
            ``tol``, it does grow, and ``"implicit"`` is an error.
            ``"implicit"``: through the fixed point that they approach. That is right only if the codes are balanced
            (use many iterations, or ``tol``); potentials are constants, and there is no second derivative. A marginal
            or weight of 0 has a gradient of 0.
        backend: ``"torch"``, ``"cpu"``, ``"cuda"``, ``"triton"``, or ``"auto"`` for the fastest that can run
            (``python -m proto_reg backends`` lists them).
        out: contiguous tensor like ``scores`` that receives the codes and is returned.
        group: a ProcessGroup, or ``"default"``: the rows of all its ranks are balanced as one batch, in plain torch. It
            takes ``num_iters`` + 1 all-reduces of K numbers, and one of 1 with ``weights``. B may differ and be 0. All
            ranks must call with the same options, ``marginals`` and ``prototype_mask``.
        potentials: (K,) or (..., K) g of an earlier call, a warm start. The first iteration takes the row potentials
            from it, ``f_i = -log W - logsumexp_k(S_ik / eps + g_k)``. Without it they are 0. -inf counts as 0. It is
            a constant, and takes one more pass over the scores.
        slack: tau > 0, in units of the scores. Columns may miss their marginals, at the price of tau times the KL
            divergence between both (Chizat et al. 2018). A large tau balances; a small one leaves softmax(S / eps).
            Plain torch computes it.
        return_potentials: also return g, (K,) or (..., K). Then ``softmax(S / eps + g)`` assigns new latents.
        return_info: also return a :class:`SinkhornInfo`, last. It waits for no device. With ``tol`` the CPU kernel or
            plain torch computes: they count their iterations.

    Returns:
        Codes like ``scores``. Every row sums to 1. No gradient flows through them unless ``differentiable``.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size or value, named.
        RuntimeError: a forced backend that is not built, with every reason.
    """
    if (ranks := None if group is None else resolve(group)) is not None:
        check_grouped(ranks, backend, differentiable)
    # The entries of SinkhornOptions as a plain tuple: the named one takes as long as a tenth of a small problem.
    options: Any = (epsilon, num_iters, tol, marginals, prototype_mask, mask, weights, nan_policy, backend)
    if potentials is not None or slack is not None or return_info:
        _check_observed(backend, tol, hard, differentiable, out, ranks, potentials, slack, return_info)
        codes, g, info = _observed(scores, options, ranks, differentiable, potentials, slack, return_info)
        codes = _delivered(codes, scores, hard, out)
        found = (codes, g) if return_potentials else (codes,)
        return (*found, info) if info is not None else found if return_potentials else codes
    given, (scores, arguments) = scores, operator_arguments(scores, options, ranks, differentiable=bool(differentiable))
    constant = ranks is None and not differentiable
    plain = not constant or kernels.backends.choose(backend, scores) == "torch"
    if not plain and out is None and not return_potentials:
        codes = _codes(scores, arguments)
        codes = codes if given.ndim < 4 else codes.reshape(given.shape)
        return _hardened(codes) if hard else codes
    solve = _solver(plain, ranks, differentiable, backend, hard, out, return_potentials)
    scores = scores.detach() if constant and scores.requires_grad else scores
    codes, g = solve(scores, *arguments) if out is None else _into(out, given, solve, scores, *arguments)
    if given.ndim > 3:
        codes = codes.reshape(given.shape)
        g = g.unflatten(0, given.shape[:-2]) if return_potentials else g
    codes = codes if out is None else out
    if hard:
        _hardened(codes)
    return (codes, g) if return_potentials else codes


def _codes(scores: Tensor, arguments: Arguments) -> Tensor:
    """Compiled, without potentials and unused arguments: on a small problem they take as long as the problem."""
    target, row_weights, epsilon, num_iters, tol, isolate = arguments
    if target is None and row_weights is None and tol is None and not isolate:
        operator = _sinkhorn_codes if torch.compiler.is_compiling() else _sinkhorn_codes_now
        return operator(scores, epsilon, num_iters)
    return _sinkhorn_codes(scores, epsilon, num_iters, target, row_weights, tol, isolate)


def _solver(
    plain: bool,
    ranks: ProcessGroup | None,
    differentiable: bool | Literal["implicit"],
    backend: str,
    hard: bool,
    out: Tensor | None,
    with_potentials: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """What computes codes and potentials from the scores and ``Arguments``."""
    if ranks is not None:
        return partial(kernels.sinkhorn_distributed.sinkhorn_over_group, ranks)
    if differentiable:
        _check_own_codes(differentiable, hard, out)
        implicit = differentiable == IMPLICIT
        return partial(kernels.sinkhorn_differentiable.differentiable_codes, backend=backend, implicit=implicit)
    if plain:
        return partial(kernels.sinkhorn_reference.sinkhorn_reference, with_potentials=with_potentials)
    return _sinkhorn


def _check_own_codes(differentiable: bool | Literal["implicit"], hard: bool, out: Tensor | None) -> None:
    """ValueError if gradients are asked for codes that cannot have them, or of no known kind."""
    check_differentiable(differentiable)
    if out is not None or hard:
        raise ValueError(
            f"differentiable: expected False with out= or hard=True, got {differentiable!r}. Gradients need codes of "
            "their own."
        )


def _check_observed(
    backend: str,
    tol: float | None,
    hard: bool,
    differentiable: bool | Literal["implicit"],
    out: Tensor | None,
    ranks: ProcessGroup | None,
    potentials: Tensor | None,
    slack: float | None,
    return_info: bool,
) -> None:
    """ValueError for options that exclude each other."""
    if differentiable:
        _check_own_codes(differentiable, hard, out)
    if slack is not None and (ranks is not None or potentials is not None):
        others = "a group" if ranks is not None else "potentials"
        raise ValueError(
            f"slack: expected None with {others}, got {slack}. It starts cold, in one process. Leave one of them out."
        )
    if slack is None and (tol is None or not return_info):
        return
    wanted = "return_info and tol" if slack is None else "slack"
    if differentiable == IMPLICIT:
        raise ValueError(
            f"differentiable: expected False or True with {wanted}, got {differentiable!r}. Use True: autograd goes "
            "through all iterations."
        )
    if backend not in ("auto", "torch") and (backend != "cpu" or slack is not None or differentiable):
        raise ValueError(
            f"backend: expected 'auto' or 'torch' with {wanted}, got {backend!r}. Plain torch computes that."
        )


def _observed(
    given: Tensor,
    options: Any,
    ranks: ProcessGroup | None,
    differentiable: bool | Literal["implicit"],
    start: Tensor | None,
    slack: float | None,
    return_info: bool,
) -> tuple[Tensor, Tensor, SinkhornInfo | None]:
    """Codes (B, K) or (G, B, K) in the dtype of the computation, potentials (..., K), and what to know about them."""
    scores, arguments = operator_arguments(given, options, ranks, differentiable=bool(differentiable))
    scores = scores.to(compute_dtype(scores.dtype))
    target, row_weights, epsilon, num_iters, tol, isolate = arguments
    slack = slack if slack is None else check_number("slack", slack, above=0)
    plain, leading = kernels.sinkhorn_observed, given.shape[:-2]
    if start is not None:
        start = _started(start, given, scores)
        scores, epsilon = plain.warm_logits(scores, target, row_weights, epsilon, start, ranks), 1.0
    if slack is None and (tol is None or not return_info):
        others = {"nan_policy": "isolate" if isolate else "propagate", "backend": options[-1], "group": ranks}
        others |= {"tol": tol, "marginals": target, "weights": row_weights, "differentiable": differentiable}
        codes, g = sinkhorn(scores, epsilon, num_iters, return_potentials=True, **others)
        iterations = scores.new_full(scores.shape[:-2], num_iters, dtype=torch.int64)
    else:
        arguments = (target, row_weights, epsilon, num_iters, tol, isolate)
        alone = slack is None and not differentiable and ranks is None
        if alone and kernels.backends.choose(options[-1], scores) == "cpu":
            codes, g, iterations = torch.ops.proto_reg.sinkhorn_counted(scores, *arguments)
        else:
            codes, g, iterations = plain.sinkhorn_observed(scores, *arguments, slack, bool(differentiable), ranks)
    info = None
    if return_info:
        wanted = target if slack is None else plain.relaxed_shares(target, g.detach(), epsilon / slack)
        rate = 1.0 if slack is None else slack / (slack + epsilon)
        error = rate * plain.column_errors(codes, wanted, row_weights, isolate, ranks)
        converged = error <= (least_tol(scores.dtype, scores.shape[-1]) if tol is None else tol)
        info = SinkhornInfo(*(x.reshape(leading) for x in (iterations, error, converged)))
    g = g if start is None else start + g
    return codes, g.reshape(*leading, g.shape[-1]), info


def _started(potentials: Tensor, given: Tensor, scores: Tensor) -> Tensor:
    """``potentials`` (K,) or (G, K) like the ``scores`` (..., B, K); the ``given`` ones may have more axes."""
    check_floating("potentials", potentials)
    *groups, _, columns = given.shape
    if tuple(potentials.shape) not in ((columns,), (*groups, columns)):
        expected = f"({columns},)" + (f" or {(*groups, columns)}" if groups else "")
        raise ValueError(
            f"potentials: expected shape {expected}, got {tuple(potentials.shape)}. Pass what return_potentials=True "
            "gave for scores like these."
        )
    potentials = potentials.detach().to(scores)
    potentials = torch.where(potentials == -torch.inf, 0.0, potentials)
    return potentials if potentials.ndim < 3 else potentials.flatten(0, -2)


def _delivered(codes: Tensor, given: Tensor, hard: bool, out: Tensor | None) -> Tensor:
    """Codes in shape and dtype of the ``given`` scores, in ``out`` if there is one."""
    codes = codes.to(given.dtype).reshape(given.shape)
    codes = _hardened(codes) if hard else codes
    if out is None:
        return codes
    _check_out(out, given)
    return out.copy_(codes)


def _hardened(codes: Tensor) -> Tensor:
    """1 for the largest code of each row, 0 for the others, NaN for undefined rows; in place."""
    undefined = codes.isnan().any(-1, keepdim=True)
    largest = codes.argmax(-1, keepdim=True)
    return codes.zero_().scatter_(-1, largest, 1.0).masked_fill_(undefined, torch.nan)


def _check_out(out: Tensor, given: Tensor) -> None:
    """ValueError unless ``out`` is like the ``given`` scores and apart from them."""
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


def _into(out: Tensor, given: Tensor, solve, scores: Tensor, *options) -> tuple[Tensor, Tensor]:
    """Write the codes of ``solve`` into ``out``, which is like the ``given`` scores."""
    _check_out(out, given)
    flat = out.view(scores.shape)
    if solve is _sinkhorn:
        return flat, _sinkhorn_out(scores, *options, flat)
    codes, potentials = solve(scores, *options)
    return flat.copy_(codes), potentials
