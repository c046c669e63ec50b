"""Time Sinkhorn on this machine by every backend that runs here and by other methods, after a check of their codes.

Shapes have names: each stands for what people use Sinkhorn for. With --backward gradients go back through the
iterations. Memory is what a call takes beyond its scores. Other packages take part if they are installed.
"""

from __future__ import annotations

import ctypes
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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import _peers
from .functional import sinkhorn
from .kernels import backends

EPSILON, NUM_ITERS = 0.05, 3
SHAPES = ("256x30", "4096x300", "2048x3000")
SETTING = (
    f"float32; cosine scores, epsilon {EPSILON}, {NUM_ITERS} iterations where a shape has no name; medians of "
    "interleaved rounds"
)
BOUND = 1e-6  # the largest absolute error that we promise; codes lie in [0, 1]
PEER_BOUND = 1e-4  # of other methods, and of gradients beside the largest one: float32 allows it
HEADER, WRONG = ("scores", "threads", "by", "ms", "x torch", "MiB", "error"), "wrong"
CANNOT, OTHER = "cannot", "another iterate"


class Case(NamedTuple):
    """Scores (..., B, K) and how to balance them."""

    name: str
    scores: Tensor
    epsilon: float = EPSILON
    num_iters: int = NUM_ITERS


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


def _causal(heads: int, length: int) -> Tensor:
    later = torch.ones(length, length, dtype=torch.bool, device="cpu").triu(1)
    return (0.3 * _normal(heads, length, length)).masked_fill(later, -torch.inf)


# What people use Sinkhorn for: the scores, epsilon and the number of iterations.
NAMED: dict[str, Callable[[], tuple[Tensor, float, int]]] = {
    "tiny": lambda: (_normal(65536, 4, 4), 1.0, 20),  # hyper-connections
    "attention": lambda: (_causal(64, 128), 0.05, 5),
    "moe": lambda: (_normal(4096, 64), 1.0, 5),  # tokens to experts
    "dino": lambda: (cosine_scores(512, 65536), 0.05, 3),
    "swav": lambda: (cosine_scores(4096, 300), 0.05, 3),
    "matching": lambda: (_normal(512, 512), 1.0, 20),  # keypoints
}


def case(text: str, device: torch.device) -> Case:
    """The case of a name, or of sizes such as ``"256x30"``; ValueError for anything else."""
    if text in NAMED:
        scores, epsilon, num_iters = NAMED[text]()
        return Case(f"{text}, {_sizes(scores)}", scores.to(device), epsilon, num_iters)
    scores = cosine_scores(*shape(text), device)
    return Case(_sizes(scores), scores)


def _sizes(scores: Tensor) -> str:
    return " x ".join(map(str, scores.shape))


class Contender(NamedTuple):
    """A method that takes part, and the largest error with which it is timed."""

    method: _peers.Method
    bound: float


def contenders(device: torch.device, *, backward: bool = False, compiled: bool = False) -> dict[str, Contender]:
    """Every backend of ours that runs on ``device``, and the other methods, by name."""
    options = {"differentiable": True} if backward else {}
    bound = PEER_BOUND if backward else BOUND
    found = {name: Contender(partial(sinkhorn, backend=name, **options), bound) for name in usable_backends(device)}
    others: dict[str, _peers.Method] = {"exp once": _peers.exp_once, "SwAV's rule": _peers.swav}
    if compiled:
        others["torch.compile of it"] = _peers.compiled_swav()
    return found | {name: Contender(method, PEER_BOUND) for name, method in (others | _peers.installed()).items()}


def rows(case: Case, seconds: float, field: Mapping[str, Contender], *, backward: bool = False) -> list[list[str]]:
    """The cells below HEADER: a row for each of the ``field``, all timed in about ``seconds``."""
    wide = case._replace(scores=case.scores.double())
    expected, device = task(reference, wide, backward=backward)(), case.scores.device
    calls = {name: task(contender.method, case, backward=backward) for name, contender in field.items()}
    size = expected.abs().max().item() if backward else 1.0
    errors = {name: largest_error(call, expected, size) for name, call in calls.items()}
    right = {name: call for name, call in calls.items() if errors[name][0] <= field[name].bound}
    took = medians(right, device, seconds)
    base, threads, found = took.get("torch", math.nan), str(torch.get_num_threads()), []
    for name, (error, text) in errors.items():
        figures = [CANNOT if error == math.inf else WRONG if name in backends.NAMES else OTHER, "", ""]
        if name in took:
            figures = [f"{took[name] * 1e3:.4g}", f"{took[name] / base:.3f}", peak_memory(right[name], device)]
        found.append([case.name, threads, name, *figures, text])
    return found


def task(method: _peers.Method, case: Case, *, backward: bool) -> Callable[[], Any]:
    """What is timed: the codes, or the gradient of a weighted sum of them by the scores."""
    if not backward:
        return partial(method, *case[1:])
    leaf = case.scores.detach().requires_grad_()
    weights = torch.arange(leaf.numel(), dtype=leaf.dtype, device=leaf.device).cos_().view(leaf.shape)
    return lambda: torch.autograd.grad(method(leaf, *case[2:]), leaf, weights)[0]


def largest_error(call: Callable[[], Any], expected: Tensor, size: float) -> tuple[float, str]:
    """The largest difference from what is ``expected``, in units of ``size``, and its text.

    inf and the message if ``call`` raises.
    """
    try:
        found = call()
    except (AssertionError, BufferError, RuntimeError, TypeError, ValueError) as objection:
        return math.inf, str(objection).split(". ")[0].splitlines()[0][:60]
    found = found if isinstance(found, Tensor) else torch.from_dlpack(found)
    error = ((found.detach().to(expected) - expected).abs().max() / size).item()
    return error, f"{error:.1e}"


def peak_memory(call: Callable[[], object], device: torch.device) -> str:
    """MiB that ``call`` takes beyond what is there before; "" where the system does not tell."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return f"{(torch.cuda.max_memory_allocated(device) - before) / 2**20:.1f}"
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        call()
        return f"{max(0, _resident('VmHWM') - before) / 1024:.1f}"
    except (AttributeError, OSError):
        return ""


def _resident(kind: str) -> int:
    """KiB of memory that this process has (VmRSS), or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind))


def cosine_scores(rows: int, columns: int, device: str | torch.device = "cpu") -> Tensor:
    """(B, K) cosines of random vectors: in 16 dimensions, so that they span -.9 to .9. The same ones every time."""
    generator = torch.Generator().manual_seed(0)
    z, v = (
        normalize(torch.randn(n, 16, dtype=torch.float32, device="cpu", generator=generator), dim=1)
        for n in (rows, columns)
    )
    return (z @ v.T).to(device)


def reference(scores: Tensor, epsilon: float = EPSILON, num_iters: int = NUM_ITERS) -> Tensor:
    """(..., B, K) float64 codes by the definition of the iterate, in the log domain. They judge every backend."""
    x = scores.double() / epsilon
    rows, columns = x.shape[-2:]
    f = x.new_zeros((*x.shape[:-1], 1))
    for _ in range(num_iters):
        g = -math.log(columns) - (x + f).logsumexp(-2, keepdim=True)
        f = -math.log(rows) - (x + g).logsumexp(-1, keepdim=True)
    return (x + f + g).exp() * rows


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
    else:
        parts.append(f"kernels for {instruction_set()}")
    parts += [f"torch {torch.__version__}", f"proto_reg {ours}", f"Python {platform.python_version()}"]
    if hasattr(os, "getloadavg"):
        parts.append(f"load {os.getloadavg()[0]:.1f} at the start")
    return ", ".join(parts)


def instruction_set() -> str:
    """The instruction set of the CPU kernels: the widest that this machine has and PROTO_REG_CPU_ISA allows."""
    most = os.environ.get("PROTO_REG_CPU_ISA", "avx512")
    asked = f" (PROTO_REG_CPU_ISA={most})" if "PROTO_REG_CPU_ISA" in os.environ else ""
    flags = set(_cpu_info("flags").split())
    if flags >= {"avx512f", "avx512vl", "avx512dq"} and most == "avx512":  # as csrc/cpu_kernels.cpp chooses
        return f"avx512{asked}"
    return f"{'avx2' if flags >= {'avx2', 'fma'} and most != 'baseline' else 'baseline'}{asked}"


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(key: str) -> str:
    """What Linux says of the first core; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def shape(text: str) -> tuple[int, int]:
    """``"256x30"`` as (256, 30); ValueError for anything else."""
    rows, columns = (int(part) for part in text.lower().split("x"))
    if rows < 1 or columns < 1:
        raise ValueError(text)
    return rows, columns
