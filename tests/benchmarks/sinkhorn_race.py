"""Sinkhorn's backends, SwAV's algorithm and a copy in one race: the parts of sinkhorn_table.py.

Each call is the one a user makes, Python included. Nothing is timed before its codes agree with float64.
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
# Largest absolute error of others that are timed, codes being in [0, 1]: float32's. Ours are held to our own promise.
PEER_BOUND = 1e-4
# From here on a fresh output may cost as much in page faults as the computation: out= is timed beside it.
LARGE = 24e6


@dataclass(frozen=True)
class Contender:
    """One call to time, and the largest error with which it still counts (None: nothing to check)."""

    name: str
    call: Callable[[], object]
    bound: float | None = PEER_BOUND


@dataclass(frozen=True)
class Result:
    """Median seconds of a call and its error; or, in ``note``, why it was not timed."""

    name: str
    seconds: float = math.nan
    error: float = math.nan
    note: str = ""


def swav(scores: Tensor, epsilon: float = EPSILON, num_iters: int = NUM_ITERS) -> Tensor:
    """SwAV's algorithm (Caron et al. 2020, eq. 5 and its listing), in place as it is published: 23 operations."""
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
    """Largest absolute difference; NaN if there is one in ``codes``, a tensor of any library."""
    codes = codes if isinstance(codes, Tensor) else torch.from_dlpack(codes)
    if codes.shape != expected.shape:
        return math.inf
    return (codes.to(expected) - expected).abs().max().item()


def contenders(scores: Tensor) -> list[Contender]:
    """A copy, SwAV's algorithm and every backend of ours that can run on these scores (B, K)."""
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
    """Check every contender, then time those that passed in interleaved rounds, each in an order of its own.

    Args:
        entered: who takes part.
        error: of what a call returns.
        device: where they compute; a GPU is timed by events of its own.
        seconds: about how long the rounds take; there are at least five.
        limit: calls that take longer than this are not repeated.
    """
    results = {contender.name: _check(contender, error, device, limit) for contender in entered}
    calls = {contender.name: contender.call for contender in entered if not results[contender.name].note}
    for name, took in medians(calls, device, seconds).items():
        results[name] = Result(name, took, results[name].error)
    return list(results.values())


def _check(contender: Contender, error: Callable[[object], float], device: torch.device, limit: float) -> Result:
    """One call, judged. Whatever a contender raises is its own affair and ends up in the table."""
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
    """Have the C library reuse freed memory, of any size, instead of returning it to the system.

    Otherwise whoever calls next may pay a page fault for every 4 KiB: the same code takes 3 or 6 ms at 4096 x 300, 140
    or 380 at 8192 x 3000, and the ratios say more about the heap than about the algorithms. Those that allocate most
    gain most from this; ours hardly allocate.
    """
    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another heap
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)


def ratio(results: Sequence[Result], name: str, base: str) -> float:
    """Time of ``name`` over that of ``base``; NaN where either was not timed."""
    seconds = {result.name: result.seconds for result in results}
    return seconds.get(name, math.nan) / seconds.get(base, math.nan)


def result_rows(results: Sequence[Result], base: str = SWAV) -> list[list[str]]:
    """Name, milliseconds, times ``base``, times a copy, error: one row a result, in words where it has no time."""
    rows = []
    for result in results:
        error = "" if math.isnan(result.error) else f"{result.error:.1e}"
        figures = [f"{result.seconds * 1e3:.4g}"]
        figures += [number(ratio(results, result.name, other)) for other in (base, COPY)]
        rows.append([result.name, *(figures if not result.note else [result.note, "", ""]), error])
    return rows


def number(value: float) -> str:
    """Three digits, none for NaN."""
    return "" if math.isnan(value) else f"{value:.3f}" if value < 10 else f"{value:.1f}"
