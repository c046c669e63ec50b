"""The parts of sinkhorn_table.py: a race between Sinkhorn's backends, SwAV's algorithm and a copy.

Each call is a user's call, with its time in Python. A contender is timed only if its codes agree with float64.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from proto_reg._bench import BOUND, EPSILON, NUM_ITERS, medians, usable_backends, wait
from proto_reg.functional import sinkhorn

SWAV, COPY, CLONE = "SwAV's algorithm", "copy into a tensor", "clone"
# The largest absolute error of other methods, for codes in [0, 1]. Float32 allows it. Ours have a stricter bound.
PEER_BOUND = 1e-4
# For scores of this many bytes, the page faults of a new output may cost as much as the computation. The race then also
# times out=.
LARGE = 24e6


@dataclass(frozen=True)
class Contender:
    """One call to time, and its largest allowed error (None: there is nothing to check)."""

    name: str
    call: Callable[[], object]
    bound: float | None = PEER_BOUND


@dataclass(frozen=True)
class Result:
    """The median seconds of a call and its error. If the call was not timed, ``note`` says why."""

    name: str
    seconds: float = math.nan
    error: float = math.nan
    note: str = ""


def swav(scores: Tensor, epsilon: float = EPSILON, num_iters: int = NUM_ITERS) -> Tensor:
    """SwAV's algorithm (Caron et al. 2020, eq. 5 and its listing), in place as in the paper: 23 operations."""
    with torch.no_grad():
        q = torch.exp(scores / epsilon).t()
        columns, rows = q.shape
        q /= torch.sum(q)
        for _ in range(num_iters):
            q /= torch.sum(q, dim=1, keepdim=True)
            q /= columns
            q /= torch.sum(q, dim=0, keepdim=True)
            q /= rows
        q *= rows
        return q.t()


def largest_error(codes: object, expected: Tensor) -> float:
    """The largest absolute difference, or NaN if ``codes`` hold NaN. ``codes`` may be a tensor of any library."""
    codes = codes if isinstance(codes, Tensor) else torch.from_dlpack(codes)
    if codes.shape != expected.shape:
        return math.inf
    return (codes.to(expected) - expected).abs().max().item()


def contenders(scores: Tensor) -> list[Contender]:
    """A copy, SwAV's algorithm, and every backend of ours that can run on these scores (B, K)."""
    large = scores.nbytes >= LARGE
    found = [Contender(COPY, partial(torch.empty_like(scores).copy_, scores), None)]
    if large:
        found.append(Contender(CLONE, scores.clone, None))
    found.append(Contender(SWAV, partial(swav, scores)))
    for name in usable_backends(scores.device):
        call = partial(sinkhorn, scores, EPSILON, NUM_ITERS, backend=name)
        found.append(Contender(f"proto_reg {name}", call, BOUND))
        if large and name != "torch":
            call = partial(call, out=torch.empty_like(scores))
            found.append(Contender(f"proto_reg {name}, out=", call, BOUND))
    return found


def compete(
    entered: Sequence[Contender],
    error: Callable[[object], float],
    device: torch.device,
    *,
    seconds: float = 2.0,
    limit: float = 20.0,
) -> list[Result]:
    """Check all contenders. Then time those without an error in interleaved rounds. Each round has its own order.

    Args:
        entered: the contenders.
        error: a function that returns the error of a call's result.
        device: the device that computes. Events of a GPU measure its time.
        seconds: the approximate time of all rounds. There are at least five rounds.
        limit: a call that takes more seconds than this is not repeated.
    """
    results = {contender.name: _check(contender, error, device, limit) for contender in entered}
    calls = {contender.name: contender.call for contender in entered if not results[contender.name].note}
    for name, took in medians(calls, device, seconds).items():
        results[name] = Result(name, took, results[name].error)
    return list(results.values())


def _check(contender: Contender, error: Callable[[object], float], device: torch.device, limit: float) -> Result:
    """Make one call and check its result. If the contender raises an error, the table shows it."""
    name, bound = contender.name, contender.bound
    try:
        start = time.perf_counter()
        output = contender.call()
        wait(device)
        took = time.perf_counter() - start
        found = math.nan if bound is None else error(output)
    except Exception as failure:
        first_line = str(failure).strip().partition("\n")[0]
        return Result(name, note=f"fails: {type(failure).__name__}: {first_line[:90]}")
    if bound is not None and math.isnan(found):
        return Result(name, note="wrong: NaN")
    if bound is not None and not found <= bound:
        return Result(name, error=found, note=f"wrong: error {found:.1e}, {bound:.0e} allowed")
    return Result(name, error=found, note=f"skipped: {took:.0f} s a call" if took > limit else "")


def keep_memory() -> None:
    """Make the C library reuse freed memory of any size. It then does not return memory to the system.

    Otherwise the next call may have a page fault for every 4 KiB. The same code then takes 3 or 6 ms at 4096 x 300, and
    140 or 380 ms at 8192 x 3000. The ratios would say more about the heap than about the algorithms. The methods that
    allocate most gain most from this. Ours allocate very little.
    """
    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library has another heap
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)


def ratio(results: Sequence[Result], name: str, base: str) -> float:
    """The time of ``name`` divided by that of ``base``, or NaN if one of them was not timed."""
    seconds = {result.name: result.seconds for result in results}
    return seconds.get(name, math.nan) / seconds.get(base, math.nan)


def result_rows(results: Sequence[Result], base: str = SWAV) -> list[list[str]]:
    """One row for each result: name, milliseconds, ratio to ``base``, ratio to a copy, error.

    A result without a time has a note in words.
    """
    rows = []
    for result in results:
        error = "" if math.isnan(result.error) else f"{result.error:.1e}"
        figures = [f"{result.seconds * 1e3:.4g}"]
        figures += [number(ratio(results, result.name, other)) for other in (base, COPY)]
        rows.append([result.name, *(figures if not result.note else [result.note, "", ""]), error])
    return rows


def number(value: float) -> str:
    """The number as a short text, which is empty for NaN."""
    return "" if math.isnan(value) else f"{value:.3f}" if value < 10 else f"{value:.1f}"
