"""Sinkhorn in plain torch in the log domain: for scores of any size, with a graph, ``tol`` or a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._checks import warn
from .._distributed import max_, sum_
from .first_order import transforming

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The potentials before an iteration, and which groups ``tol`` had stopped there.
Step: TypeAlias = tuple[Tensor, Tensor | None]


def balance_logits(
    x: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    group: ProcessGroup | None = None,
    *,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The iterations for scores of any size, by one softmax over the rows each. No control flow depends on the scores.

    Without f each iteration is ``P = softmax_k(S / eps + g)``, ``g_k -= log(sum_i w_i P_ik / (W r_k))``. After
    the first step column k of the plan sums to W r_k, so nothing underflows and nothing is clamped. On the CPU ``tol``
    ends the iterations. Elsewhere the host does not wait: the potentials just stay where they are.

    With a ``group`` the rows of all its ranks are one batch, which takes ``num_iters`` + 1 all-reduces of K numbers. A
    rank without rows takes part.

    ``counter``: (..., 1) ones, to which each problem's iterations after the first are added.
    """
    start = start_of_iterations(x, marginals, weights, epsilon, group)
    g = iterate(start, weights, num_iters - 1, tol, group, counter=counter)
    codes = (start.x + g[..., None, :]).softmax(-1)
    largest = torch.finfo(g.dtype).max
    potentials = torch.where(g == -torch.inf, -torch.inf, (g - start.column_shift).clamp(-largest, largest))
    return codes, potentials


class Start(NamedTuple):
    """What the iterations start from."""

    x: Tensor  # (..., B, K) S / eps less the maxima of its columns and rows
    logits: Tensor  # (..., B, K) S / eps less the maxima of its columns, plus log w
    column_shift: Tensor  # (..., K) the columns' maxima
    mass: Tensor  # (..., K) log sum_i exp(logits), -inf for a column that gets nothing
    g: Tensor  # (..., K) the first potentials
    target: Tensor  # (..., K) W r, or (K,) if all groups share them
    total: Tensor  # (..., 1) W


def start_of_iterations(
    x: Tensor, marginals: Tensor | None, weights: Tensor | None, epsilon: float, group: ProcessGroup | None = None
) -> Start:
    """Centre the scores and balance the columns once, see :func:`balance_logits`."""
    below, x, log_weights, tops, top = centred(x, marginals, weights, epsilon, group)
    alive, logits = tops != -torch.inf, below + log_weights
    target = x.new_full((x.shape[-1],), 1.0 / x.shape[-1]) if marginals is None else marginals
    mass, total = column_masses(logits, alive, weights, group)
    # A column of -inf scores, or of marginal 0, gets nothing; the others are unaffected.
    g = torch.where(alive & (mass != -torch.inf), log_or_zero(target, target > 0) - mass, -torch.inf)
    if weights is not None or group is not None:
        g = torch.where(total > 0, g, 0.0)
    return Start(x, logits, top / epsilon, mass, g, total * target, total)


def centred(
    x: Tensor, marginals: Tensor | None, weights: Tensor | None, epsilon: float, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`centre` returns, and log weights (..., B, 1) or (), maxima (..., K) of the columns, and the shifts.

    A column that gets nothing has a maximum of -inf. Its shift is 0, the others' are their maxima.
    """
    if marginals is not None:  # left-out columns do not influence how scores are centred; a NaN stays NaN
        x = torch.where((marginals == 0).unsqueeze(-2) & (x < torch.inf), -torch.inf, x)
    counted = _counted(weights)
    log_weights = x.new_zeros(()) if weights is None else log_or_zero(weights, counted).to(x.dtype)[..., None]
    tops = _column_tops(x, counted, log_weights, epsilon, group)
    top = finite_or_zero(tops)
    return *centre(x, top, epsilon), log_weights, tops, top


def log_or_zero(x: Tensor, positive: Tensor | None) -> Tensor:
    """log x where it is ``positive``, 0 elsewhere: autograd has no slope for the logarithm of 0."""
    return (x if positive is None else torch.where(positive, x, 1.0)).log()


def _column_tops(
    x: Tensor, counted: Tensor | None, log_weights: Tensor, epsilon: float, group: ProcessGroup | None
) -> Tensor:
    """The columns' maxima (..., K); in a group those of S + eps log w, so that exponentials sum safely."""
    if group is not None:
        x = x + epsilon * log_weights
    tops = masked(x, counted).detach()  # a shift has no slope
    empty = tops.shape[-2] == 0
    tops = tops.new_full((*tops.shape[:-2], tops.shape[-1]), -torch.inf) if empty else tops.amax(-2)
    return max_(tops, group)


def column_masses(
    logits: Tensor, alive: Tensor, weights: Tensor | None, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """log sum_i exp(logits) of each column (..., K), -inf if not ``alive``; and the sum of all weights (..., 1)."""
    logits = masked(logits, _counted(weights))
    rows = logits.new_full((*logits.shape[:-2], 1), logits.shape[-2])
    total = rows if weights is None else weights.sum(-1, keepdim=True).to(logits.dtype)
    if group is not None:
        both = sum_(torch.cat([logits.exp().sum(-2), total], -1), group)
        return both[..., :-1].log(), both[..., -1:]
    if not logits.requires_grad:
        return logits.logsumexp(-2), total
    # The slope at a column of nothing but -inf would be NaN.
    logits = torch.where(alive[..., None, :], logits, 0.0)
    return torch.where(alive, logits.logsumexp(-2), -torch.inf), total


def centre(x: Tensor, column_top: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """S / eps less its column maxima, and less its row maxima too; subtracted first so that float32 keeps the digits.

    Returns both (..., B, K). A row of nothing but -inf is NaN in the second.
    """
    x, columns = x * 0.125, column_top[..., None, :] * 0.125  # of eighths no difference overflows
    below = x - columns
    # The rounding error of the subtraction (Knuth's two-sum): without it scores of hundreds lose 1e-4 of S / eps.
    back = below - x
    lost = ((x - (below - back)) - (columns + back)).nan_to_num(0.0)
    centred = (below - below.detach().amax(-1, keepdim=True)) + lost
    scale = min(8 / epsilon, torch.finfo(x.dtype).max)
    return below * scale, centred * scale


def iterate(
    start: Start,
    weights: Tensor | None,
    passes: int,
    tol: float | None,
    group: ProcessGroup | None = None,
    *,
    counter: Tensor | None = None,
    steps: list[Step] | None = None,
) -> Tensor:
    """The column potentials (..., K) after ``passes`` further iterations, each of which is added to ``steps``.

    ``counter``: see :func:`balance_logits`.
    """
    x, g, target = start.x, start.g, start.target
    at_hand = group is None and readable(x)
    for _ in range(passes):
        p = (x + g[..., None, :]).softmax(-1)
        if weights is not None:
            p = torch.where(weights[..., None] > 0, p * weights[..., None].to(p), 0.0)
        column = sum_(p.sum(-2), group)
        gone = column == 0  # and stays so
        met = torch.where(gone, 1.0, column) / torch.where(gone, 1.0, target)
        updated = g - met.log()
        if tol is None:
            if steps is not None:
                steps.append((g, None))
            g = updated
            continue
        # The other columns share what columns of nothing but -inf do not take.
        left = torch.where(gone, 0.0, target).sum(-1, keepdim=True) / target.sum(-1, keepdim=True)
        error = torch.where(gone, 0.0, (met * left - 1).abs()).amax(-1, keepdim=True)
        settled = error <= least_error(g).clamp_min(tol)
        if steps is not None:
            steps.append((g, settled))
        # The test stays on the device: after convergence the potentials no longer move.
        g = torch.where(settled, g, updated)
        if counter is not None:
            counter += ~settled
        if at_hand and ended(settled, error, tol):
            break
    return g


def least_error(g: Tensor) -> Tensor:
    """The error (..., 1) that the rounding of the potentials (..., K) makes. No iteration gets below it."""
    return torch.where(g == -torch.inf, 0.0, g.abs()).amax(-1, keepdim=True) * torch.finfo(g.dtype).eps


def readable(x: Tensor) -> bool:
    """Whether the host may look at numbers computed from ``x``: on the CPU that waits for nothing."""
    return x.is_cpu and not torch.compiler.is_compiling() and not transforming()


def ended(settled: Tensor, error: Tensor, tol: float) -> bool:
    """Whether no problem goes on. Warns if one of them ends at an ``error`` above ``tol``."""
    if not bool((settled | error.isnan()).all()):
        return False
    reached = float(error.detach().amax())
    if reached > tol:
        single = error.dtype == torch.float32
        warn(
            f"tol: {tol:.2g} is less than {'float32' if single else 'float64'} can tell of scores so large beside "
            f"epsilon: the iterations ended at an error of {reached:.2g}. Use a larger tol or epsilon"
            f"{', or float64 scores.' if single else '.'}"
        )
    return True


def finite_or_zero(top: Tensor) -> Tensor:
    """Maxima. A maximum of -inf becomes 0, which shifts nothing."""
    return torch.where(top == -torch.inf, 0.0, top)


def masked(x: Tensor, counted: Tensor | None) -> Tensor:
    """``x`` (..., B, K) with -inf in the rows that are not ``counted`` (..., B); None: all are."""
    return x if counted is None else torch.where(counted[..., None], x, -torch.inf)


def _counted(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights > 0
