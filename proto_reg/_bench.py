"""Time Sinkhorn on this machine by every backend that runs here, after its codes agree with float64."""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .functional import sinkhorn
from .kernels import backends

EPSILON, NUM_ITERS = 0.05, 3
SHAPES = ((256, 30), (4096, 300), (2048, 3000))
SETTING = f"float32 cosine scores, epsilon {EPSILON}, {NUM_ITERS} iterations; medians of interleaved rounds"
BOUND = 1e-6  # the largest absolute error that we promise; codes lie in [0, 1]
HEADER, WRONG = ("scores", "backend", "ms", "x torch", "error"), "wrong"


def rows(scores: Tensor, seconds: float) -> list[list[str]]:
    """The cells below HEADER for ``scores`` (B, K): a row for each backend, timed for about ``seconds`` in all."""
    expected, device = reference(scores), scores.device
    calls = {name: partial(sinkhorn, scores, EPSILON, NUM_ITERS, backend=name) for name in usable_backends(device)}
    errors = {name: (call().double() - expected).abs().max().item() for name, call in calls.items()}
    took = medians({name: call for name, call in calls.items() if errors[name] <= BOUND}, device, seconds)
    size, base = "{} x {}".format(*scores.shape), took.get("torch", math.nan)
    found = []
    for name, error in errors.items():
        figures = [f"{took[name] * 1e3:.4g}", f"{took[name] / base:.3f}"] if name in took else [WRONG, ""]
        found.append([size, name, *figures, f"{error:.1e}"])
    return found


def cosine_scores(rows: int, columns: int, device: str | torch.device = "cpu") -> Tensor:
    """(B, K) cosines of random vectors: in 16 dimensions, so that they span -.9 to .9. The same ones every time."""
    generator = torch.Generator().manual_seed(0)
    z, v = (
        normalize(torch.randn(n, 16, dtype=torch.float32, device="cpu", generator=generator), dim=1)
        for n in (rows, columns)
    )
    return (z @ v.T).to(device)


def reference(scores: Tensor, epsilon: float = EPSILON, num_iters: int = NUM_ITERS) -> Tensor:
    """(B, K) float64 codes by the definition of the iterate, in the log domain. They judge every backend."""
    x = scores.double() / epsilon
    f = x.new_zeros(len(x), 1)
    for _ in range(num_iters):
        g = -math.log(x.shape[1]) - (x + f).logsumexp(0)
        f = -math.log(len(x)) - (x + g).logsumexp(1, keepdim=True)
    return x.add_(f).add_(g).exp_().mul_(len(x))


def usable_backends(device: torch.device) -> list[str]:
    """Backends that can compute on ``device``."""
    return [name for name in backends.NAMES if name != "auto" and not backends.reasons(name, device)]


def medians(calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds of each call, from interleaved rounds in random order.

    The rounds take about ``seconds`` in all. There are at least five.
    """
    # Each measurement takes milliseconds, so that clocks and first cache misses do not matter.
    once = {name: clock(call, 1, device) for name, call in calls.items()}
    times = {name: max(1, min(1000, math.ceil(2e-3 / took))) for name, took in once.items()}
    round_seconds = sum(times[name] * took for name, took in once.items())
    samples: dict[str, list[float]] = {name: [] for name in calls}
    # In random order: no call always follows the same other one.
    shuffle = random.Random(0).sample
    for _ in range(max(5, min(99, math.ceil(seconds / max(round_seconds, 1e-9))))):
        for name in shuffle(list(calls), len(calls)):
            if once[name] < 0.05:
                calls[name]()  # finds the caches as its own next call will
            samples[name].append(clock(calls[name], times[name], device))
    return {name: statistics.median(taken) for name, taken in samples.items()}


def clock(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of one call among ``times`` of them in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait(device)
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


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns line up in a terminal too."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *rows)
    ]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def environment(device: torch.device) -> str:
    """What the figures hold for: device, threads, versions and the load of the machine."""
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
