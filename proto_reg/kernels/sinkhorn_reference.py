"""Balanced assignment in plain torch. It judges every compiled kernel, and runs if there is none."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._checks import compute_dtype, warn
from .._distributed import max_, sum_
from .first_order import transforming

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# While S / eps spans less than this, exp(S / eps) and the scaling vectors stay within float32.
SAFE_RANGE = 40.5
# The potentials before an iteration, and which groups ``tol`` had stopped there.
Step: TypeAlias = tuple[Tensor, Tensor | None]
# Up to so many elements one common reference is accurate enough.
SMALL = 1 << 16
LEAST = 1e-37  # of the inverse of a scaling factor


def sinkhorn_reference(
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
    with_potentials: bool = True,
) -> tuple[Tensor, Any]:
    """Balanced codes and column potentials, for every finite score in every float dtype.

    It starts from f = 0 and repeats ``num_iters`` times ``g_k = log r_k - logsumexp_i(log w_i + S_ik / eps + f_i)`` and
    ``f_i = -log W - logsumexp_k(S_ik / eps + g_k)``; the codes are ``W exp(S / eps + f + g)``, W the sum of weights.

    Args:
        scores: (B, K) or (G, B, K), any float dtype; G separate problems.
        marginals: (K,) or (G, K) target column masses r, or None for 1/K each.
        weights: (B,) or (G, B) w >= 0: a row of weight 2 counts as two; a row of weight 0 gets codes too.
        epsilon: entropic regularisation, > 0, in units of the scores.
        num_iters: iterations (at most, with ``tol``).
        tol: stop once every column is within this relative error of its marginal.
        isolate: rows that hold a NaN, a +inf or nothing but -inf count as absent and get NaN codes. Scores in columns
            of marginal 0 do not matter for this.
        with_potentials: False may return None in their place.

    Returns:
        codes: like ``scores``, rows sum to 1.
        potentials: (K,) or (G, K) g, so that ``softmax(S / eps + g)`` assigns new rows by the same balance.
    """
    x, weights, usable = usable_rows(scores, marginals, weights, isolate)
    codes, potentials = _solve(x, marginals, weights, epsilon, num_iters, tol, with_potentials)
    codes = isolated(codes, usable)
    return codes if codes.dtype == scores.dtype else codes.to(scores.dtype), potentials


def sinkhorn_cross_entropy_reference(
    scores: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    isolate: bool,
    temperature: float,
    with_codes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of softmax(S / tau) against the codes of :func:`sinkhorn_reference` (paper, eq. 10), and its slope.

    Returns:
        loss: () ``-(1/W) sum_i w_i sum_k q_ik log p_ik``, p = softmax(S / tau).
        gradient: (B, K) by the scores, codes held fixed: ``w_i (p - q) / (tau W)``.
        potentials: (K,)
        codes: (B, K), or (0, K) unless ``with_codes``.

    Autograd and ``torch.func`` can differentiate the loss. The codes are constants.
    """
    x, weights, usable = usable_rows(scores, marginals, weights, isolate)
    codes, potentials = _solve(x.detach(), marginals, weights, epsilon, num_iters, tol)
    targets = codes
    if weights is not None and torch.is_grad_enabled():
        # Left out later, a NaN would reach the gradient.
        x, targets = (torch.where(weights[:, None] > 0, rows, 0.0) for rows in (x, codes))
    loss, gradient = cross_entropy_of_rows(x, targets, temperature)
    if weights is None:
        loss, gradient = loss.mean(), gradient / scores.shape[0]  # len() would fix the size in a torch.export
    else:
        share = (weights / torch.where(weights.sum() > 0, weights.sum(), 1.0)).to(x.dtype)
        loss = torch.where(share > 0, share * loss, 0.0).sum()
        gradient = torch.where(share[:, None] > 0, share[:, None] * gradient, 0.0)
    codes = isolated(codes, usable)
    codes = codes.to(scores.dtype) if with_codes else scores.new_empty((0, scores.shape[1]))
    return loss, gradient.to(scores.dtype), potentials, codes


def cross_entropy_of_rows(x: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """-sum_k q_k log softmax_k(x / tau) of each row (B,), and its gradient by ``x`` (B, K)."""
    log_p = log_probabilities(x, temperature)
    return cross_entropies(log_p, codes), away_from_codes(log_p.exp(), codes) / temperature


def log_probabilities(x: Tensor, temperature: float) -> Tensor:
    """log softmax(x / tau) of each row (B, K), for scores of any size."""
    return ((x - x.detach().amax(1, keepdim=True)) / temperature).log_softmax(1)


def cross_entropies(log_p: Tensor, codes: Tensor) -> Tensor:
    """-sum_k q_k log p_k of each row (B,). A prototype with q = 0 adds 0, even if p is 0."""
    return -(codes * torch.where(codes == 0, 0.0, log_p)).sum(1)


def away_from_codes(p: Tensor, codes: Tensor) -> Tensor:
    """p - q for predictions and codes (B, K). With a single prototype it is exactly 0."""
    return p - codes if codes.shape[1] > 1 else 0 * codes


def usable_rows(
    scores: Tensor, marginals: Tensor | None, weights: Tensor | None, isolate: bool, *, or_absent: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scores in the dtype of the computation, weights without the rows to isolate, and which rows remain.

    ``or_absent``: also leave out rows that hold a NaN and have no weight. Otherwise every gradient would be NaN.
    """
    dtype = compute_dtype(scores.dtype)
    x = scores if scores.dtype == dtype else scores.to(dtype)
    absent = or_absent and weights is not None
    if not isolate and not absent:
        return x, weights, None
    possible = x > -torch.inf
    if marginals is not None:
        possible = possible & (marginals > 0).unsqueeze(-2)
    usable = ~(x.isnan() | (x == torch.inf)).any(-1) & possible.any(-1)
    if weights is None:
        weights = usable.to(torch.float32)
    elif isolate:
        weights = torch.where(usable, weights, 0.0)
    else:
        usable = usable | (weights > 0)
    return torch.where(usable[..., None], x, 0.0), weights, usable


def isolated(codes: Tensor, usable: Tensor | None) -> Tensor:
    """``codes`` (..., B, K) with NaN in the rows that are not ``usable`` (..., B); None: all are."""
    return codes if usable is None else torch.where(usable[..., None], codes, torch.nan)


def _solve(
    x: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    with_potentials: bool = True,
) -> tuple[Tensor, Any]:
    """Codes and potentials in the dtype of ``x``, by the fastest way that is safe for these scores."""
    marginals = normalised(marginals, x)
    if x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling():  # fakes hold no number
        # Here two numbers are read at no cost. Elsewhere control flow must not wait for the device.
        if x.ndim == 3:
            reference, low = x.amax(-1, keepdim=True), x.amin()
            high = reference.amax(-2, keepdim=True)
        elif x.numel() < SMALL:
            low, high = x.aminmax()
            reference = high
        else:  # one for each row: two more operations, and small exponents where errors of many rows add up
            reference = x.amax(1, keepdim=True)
            low, high = x.amin(), reference.amax()
        narrow = float(high.amax()) - float(low) < SAFE_RANGE * epsilon and 1e-30 < epsilon < 1e30
        if narrow and (weights is None or bool(weights.any(-1).all())) and _exact_products():
            if x.ndim == 2:
                return _scale(x, reference, high, marginals, weights, epsilon, num_iters, tol, with_potentials)
            if tol is None:  # groups settle one by one
                return _scale_groups(x, reference, high, marginals, weights, epsilon, num_iters)
    if tol is None and not transforming():
        return scale_plans(x, marginals, weights, epsilon, num_iters, with_potentials)
    return balance_logits(x, marginals, weights, epsilon, num_iters, tol)


def normalised(marginals: Tensor | None, x: Tensor) -> Tensor | None:
    """Marginals in the dtype of ``x``, summing to 1."""
    if marginals is None:
        return None
    marginals = marginals.to(x)
    return marginals / marginals.sum(-1, keepdim=True)


def _scale(
    x: Tensor,
    reference: Tensor,
    high: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    tol: float | None,
    with_potentials: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute E = exp((S - reference) / eps) once. Then only scaling vectors change, by matrix-vector products."""
    scale = math.log2(math.e) / epsilon  # exp2() is several times as fast as exp()
    e = (x - reference).mul_(scale).exp2_()
    u = None if reference is high else (reference - high).mul_(scale).exp2_().squeeze(1)
    if weights is not None:
        weights = weights.to(e)
        u = weights if u is None else u.mul_(weights)
    total = float(x.shape[0]) if weights is None else float(weights.sum())
    share = 1 / x.shape[1] if marginals is None else marginals
    # The factor that all columns share is left out of v and kept here: it would grow out of range over many
    # iterations.
    alike = total / x.shape[1] if marginals is None else total
    rescale = num_iters > 4 or not 1e-3 < alike < 1e3
    left_out = []
    sums = e.sum(0) if u is None else _column_sums(e, u)
    v = sums.reciprocal_() if marginals is None else marginals / sums
    for _ in range(num_iters - 1):
        u = torch.mv(e, v).reciprocal_()
        sums = _column_sums(e, u if weights is None else u.mul_(weights))
        if tol is not None and bool(((v * sums / (total * share) - 1).abs().nan_to_num_(0.0) <= tol).all()):
            break
        v = sums.reciprocal_() if marginals is None else marginals / sums
        if rescale:
            v.mul_(alike)
        else:
            left_out.append(alike)
    if x.numel() < SMALL:
        u = torch.mv(e, v).reciprocal_()
        codes = e.mul_(v).mul_(u.unsqueeze(1))
    else:  # sum() adds in pairs, which is more accurate for long rows
        codes = e.mul_(v).mul_(e.sum(1, keepdim=True).reciprocal_())
    if not with_potentials:
        return codes, None
    uniform = -math.log(x.shape[1]) if marginals is None else 0.0
    return codes, v.log_().add_(uniform + sum(map(math.log, left_out)) - float(high) / epsilon)


def _scale_groups(
    x: Tensor,
    reference: Tensor,
    high: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
) -> tuple[Tensor, Tensor]:
    """:func:`_scale` for groups (G, B, K), by products of one matrix each."""
    scale = math.log2(math.e) / epsilon
    rows, columns = x.shape[1:]
    e = (x - reference).mul_(scale).exp2_()
    u = (reference - high).mul_(scale).exp2_()
    total = e.new_tensor(rows) if weights is None else weights.sum(1)[:, None, None].to(e)
    w = None if weights is None else weights[..., None].to(e) * (rows / total)
    target = rows / columns if marginals is None else rows * marginals.view(-1, 1, columns)
    v = target / _group_sums(e, u if w is None else u.mul_(w))
    for _ in range(num_iters - 1):
        u = torch.bmm(e, v.mT).reciprocal_()
        v = target / _group_sums(e, u if w is None else u.mul_(w))
    codes = e.mul_(v)
    codes.div_(codes.sum(2, keepdim=True))
    return codes, (v.log_() - total.log() - high / epsilon).squeeze(1)


def _group_sums(e: Tensor, u: Tensor, rows: int = 256) -> Tensor:
    """Column sums (G, 1, K) of E (G, B, K) times u (G, B, 1)."""
    return torch.bmm(u.mT, e) if e.shape[1] <= rows else (e * u).sum(1, keepdim=True)


def _exact_products() -> bool:
    """Whether products of matrices keep float32 on the CPU."""
    chosen = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return chosen in ("none", "ieee") and not torch.is_autocast_enabled("cpu")


def _column_sums(e: Tensor, u: Tensor, rows: int = 256) -> Tensor:
    """``u @ e`` in stretches of ``rows``: one matrix-vector product would add a column up one by one."""
    if e.shape[0] <= rows:
        return torch.mv(e.t(), u)
    whole = e.shape[0] - e.shape[0] % rows
    sums = torch.bmm(u[:whole].view(-1, 1, rows), e[:whole].view(-1, rows, e.shape[1])).sum((0, 1))
    return sums if whole == e.shape[0] else sums + torch.mv(e[whole:].t(), u[whole:])


def scale_plans(
    x: Tensor,
    marginals: Tensor | None,
    weights: Tensor | None,
    epsilon: float,
    num_iters: int,
    with_potentials: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`balance_logits` without a graph or ``tol``, in half as many operations.

    The first iteration gives a plan E whose rows sum to 1. Then only scaling vectors change: ``u = 1 / E v`` and
    ``v = r / E^T u``. In each iteration u v grows by at most B K (with marginals B K / r), so E is computed
    again before an entry that underflowed could count.
    """
    if marginals is not None:
        x = torch.where((marginals == 0).unsqueeze(-2) & (x < torch.inf), -torch.inf, x)
    counted = total = w = None
    if weights is not None:
        counted, total = weights > 0, weights.sum(-1, keepdim=True).to(x.dtype)
        w = weights * (x.shape[-2] / torch.where(total > 0, total, 1.0))
    tops = _masked(x, counted).amax(-2)
    tops = tops.clamp_min_(torch.finfo(x.dtype).min) if w is None else finite_or_zero(tops)
    below, x = centre(x, tops, epsilon)
    # Means instead of sums keep both vectors near 1. h is minus the potential, but for a constant; inf: gets nothing.
    h = _mean_over_rows(_masked(below, counted).exp_(), w).log_().nan_to_num_(torch.nan, torch.inf, torch.inf)
    shares = None if marginals is None else x.shape[-1] * marginals
    h = h if shares is None else h - shares.log()
    period, inverse = 4 if shares is None else 2, h  # the first iteration replaces it
    for iteration in range(num_iters - 1):
        if iteration % period == 0:
            h = h if iteration == 0 else h + (inverse * x.shape[-1]).log_()
            e, u = (x - h[..., None, :]).softmax(-1), w
            if counted is not None:  # a row that does not count may hold a NaN
                e = torch.where(counted[..., None], e, 1.0)
        else:
            u = (e / inverse[..., None, :]).mean(-1)
            u = u.reciprocal_() if w is None else w / u
        inverse = _mean_over_rows(e, u).clamp_min_(LEAST)  # of v
        inverse = inverse if shares is None else (inverse / shares).clamp_(LEAST, 1 / LEAST)
    h = h if num_iters == 1 else h + inverse.log_()
    h = h if total is None else torch.where(total > 0, h, 0.0)
    codes = (x - h[..., None, :]).softmax(-1)
    return codes, _potentials(h, tops / epsilon, x, total, min(num_iters, 2)) if with_potentials else None


def _potentials(h: Tensor, shift: Tensor, x: Tensor, total: Tensor | None, lost: int) -> Tensor:
    """Potentials (..., K) from ``h``. Means have left out the total, and K ``lost`` times."""
    # math.log() of a size would fix it in a torch.export.
    rows = x.new_full((1,), x.shape[-2]) if total is None else torch.where(total > 0, total, 1.0)
    left_out = rows.log() + lost * x.new_full((1,), x.shape[-1]).log()
    largest = torch.finfo(x.dtype).max
    g = torch.where(h == torch.inf, -torch.inf, (-h - left_out - shift).clamp(-largest, largest))
    return g if total is None else torch.where(total > 0, g, 0.0)


def _mean_over_rows(e: Tensor, u: Tensor | None) -> Tensor:
    """The columns' means (..., K) of the rows times u (..., B)."""
    return (e if u is None else e * u[..., None]).mean(-2)


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
    tops = _masked(x, counted).detach()  # a shift has no slope
    empty = tops.shape[-2] == 0
    tops = tops.new_full((*tops.shape[:-2], tops.shape[-1]), -torch.inf) if empty else tops.amax(-2)
    return max_(tops, group)


def column_masses(
    logits: Tensor, alive: Tensor, weights: Tensor | None, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """log sum_i exp(logits) of each column (..., K), -inf if not ``alive``; and the sum of all weights (..., 1)."""
    logits = _masked(logits, _counted(weights))
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


def _masked(x: Tensor, counted: Tensor | None) -> Tensor:
    return x if counted is None else torch.where(counted[..., None], x, -torch.inf)


def _counted(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights > 0
