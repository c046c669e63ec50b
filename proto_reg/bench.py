"""``python -m proto_reg.kernels bench``: Sinkhorn on this machine, every backend beside SwAV's algorithm and a copy.

Each call is the one a user makes, Python included. Nothing is timed before its codes agree with float64. The parts
serve tests/benchmarks/sinkhorn_table.py as well, which adds the peers.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .functional import sinkhorn
from .kernels import backends

EPSILON, NUM_ITERS, TEMPERATURE = 0.05, 3, 0.1
SHAPES = ((256, 30), (4096, 300), (2048, 3000))
SWAV, COPY, CLONE = "SwAV's algorithm", "copy into a tensor", "clone"
SETTING = f"float32 cosine scores, epsilon {EPSILON}, {NUM_ITERS} iterations; medians of interleaved rounds"
# Largest absolute error, codes being in [0, 1], of what is timed: ours by our own promise, the others by float32's.
BOUND, PEER_BOUND = 1e-6, 1e-4
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


def cosine_scores(rows: int, columns: int, device: str | torch.device = "cpu") -> Tensor:
    """(B, K) cosines of random vectors: in 16 dimensions, so that they span -.9 to .9. The same ones every time."""
    generator = torch.Generator().manual_seed(0)
    z, v = (
        normalize(torch.randn(n, 16, dtype=torch.float32, device="cpu", generator=generator), dim=1)
        for n in (rows, columns)
    )
    return (z @ v.T).to(device)


def reference(scores: Tensor, epsilon: float = EPSILON, num_iters: int = NUM_ITERS) -> Tensor:
    """(B, K) float64 codes by the definition of the iterate, in the log domain: what every contender is judged by."""
    x = scores.double() / epsilon
    f = x.new_zeros(len(x), 1)
    for _ in range(num_iters):
        g = -math.log(x.shape[1]) - (x + f).logsumexp(0)
        f = -math.log(len(x)) - (x + g).logsumexp(1, keepdim=True)
    return x.add_(f).add_(g).exp_().mul_(len(x))


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


def usable_backends(device: torch.device) -> list[str]:
    """Backends that can compute on ``device``."""
    return [name for name in backends.NAMES if name != "auto" and not backends.reasons(name, device)]


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
    fit = [contender for contender in entered if not results[contender.name].note]
    # Milliseconds at least for each measurement: clocks and the first cache misses are then nothing.
    once = {contender.name: clock(contender.call, 1, device) for contender in fit}
    times = {name: max(1, min(1000, math.ceil(2e-3 / took))) for name, took in once.items()}
    round_seconds = sum(times[name] * took for name, took in once.items())
    samples: dict[str, list[float]] = {contender.name: [] for contender in fit}
    # Not merely rotated: nobody always runs in the wake of the same other one.
    shuffle = random.Random(0).sample
    for _ in range(max(5, min(99, math.ceil(seconds / max(round_seconds, 1e-9))))):
        for contender in shuffle(fit, len(fit)):
            if once[contender.name] < 0.05:
                contender.call()  # finds the caches as its own next call will
            samples[contender.name].append(clock(contender.call, times[contender.name], device))
    for name, taken in samples.items():
        results[name] = Result(name, statistics.median(taken), results[name].error)
    return list(results.values())


def _check(contender: Contender, error: Callable[[object], float], device: torch.device, limit: float) -> Result:
    """One call, judged. Whatever a contender raises is its own affair and ends up in the table."""
    name, bound = contender.name, contender.bound
    try:
        start = time.perf_counter()
        output = contender.call()
        _wait(device)
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


def clock(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of one call among ``times`` of them in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _wait(device)
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns line up in a terminal too."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *rows)
    ]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def environment(device: torch.device) -> str:
    """What the figures hold for: device, threads, versions and how busy the machine was."""
    try:
        ours = version("proto_reg")
    except PackageNotFoundError:
        ours = "not installed"
    threads = torch.get_num_threads()
    parts = [f"CPU {_cpu_model()}", f"{os.cpu_count()} cores", f"{threads} thread{'s' * (threads != 1)}"]
    if device.type == "cuda":
        parts.append(f"GPU {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}")
    parts += [f"torch {torch.__version__}", f"proto_reg {ours}", f"Python {platform.python_version()}"]
    if hasattr(os, "getloadavg"):
        parts.append(f"load {os.getloadavg()[0]:.1f} at the start")
    return ", ".join(parts)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def shape(text: str) -> tuple[int, int]:
    """``"256x30"`` as (256, 30); ValueError for anything else."""
    rows, columns = (int(part) for part in text.lower().split("x"))
    if rows < 1 or columns < 1:
        raise ValueError(text)
    return rows, columns


def add_arguments(
    parser: argparse.ArgumentParser, shapes: Sequence[tuple[int, int]], threads: int, seconds: float
) -> None:
    """The options that the short and the full form share, with their defaults."""
    parser.add_argument("--shapes", nargs="+", type=shape, default=shapes, metavar="BxK", help="e.g. 256x30 4096x300")
    parser.add_argument("--threads", type=int, default=threads, help=f"of PyTorch on the CPU (default: {threads})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"about, of timing a table (default: {seconds})")
    parser.add_argument("--fresh-memory", action="store_true", help="leave the heap alone: large results page-fault")


def begin(arguments: argparse.Namespace) -> str:
    """Set threads and memory as ``arguments`` say; returns the lines that stand above every table."""
    torch.set_num_threads(arguments.threads)
    if not arguments.fresh_memory:
        keep_memory()
    memory = "as the C library has it" if arguments.fresh_memory else "kept and reused"
    return f"{environment(torch.device(arguments.device))}\n{SETTING}; freed memory {memory}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of this machine; 1 if a backend of ours was refused, else 0."""
    parser = argparse.ArgumentParser(prog="python -m proto_reg.kernels bench", description=__doc__)
    add_arguments(parser, SHAPES, torch.get_num_threads(), seconds=1.0)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    print(begin(arguments), flush=True)
    lines, refused = [], False
    for rows, columns in arguments.shapes:
        scores = cosine_scores(rows, columns, device)
        expected = reference(scores)
        error = partial(largest_error, expected=expected)
        results = compete(contenders(scores), error, device, seconds=arguments.seconds)
        refused |= any(result.note and result.name.startswith("proto_reg") for result in results)
        lines += [[f"{rows} x {columns}", *line] for line in result_rows(results)]
    print(table(["scores", "", "ms", "x SwAV", "x copy", "error"], lines))
    for name in backends.NAMES[1:]:
        for reason in backends.reasons(name, device):
            print(f"{name} did not run: {reason}")
    return int(refused)
