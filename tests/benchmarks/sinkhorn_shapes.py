"""Sinkhorn on the shapes and scores that people have: ``python tests/benchmarks/sinkhorn_shapes.py``.

Many small matrices (hyper-connections), masked attention, and scores of a wide span. Each time stands beside that of
SwAV's algorithm on the same scores in the same run. A second table has forward and backward pass through all
iterations, beside autograd through plain torch. The seconds are those of the calling thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import sinkhorn_race as race
import torch
from torch import Tensor

from proto_reg import _bench, _peers
from proto_reg.functional import sinkhorn

Case = tuple[Tensor, float, int]


def cases() -> dict[str, Case]:
    """Scores, epsilon and iterations by name. They are the same every time."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    cosines, few, codes = (_bench.cosine_scores(*shape) for shape in ((4096, 300), (4096, 6), (512, 65536)))
    attention = 0.3 * normal(64, 128, 128)
    low, random = cosines.clone(), torch.rand(64, 128, 128, generator=generator)
    low[7, 9] = -3
    causal = torch.ones(128, 128).triu(1) > 0
    return {
        "65536 x 4 x 4, 20 iterations": (normal(65536, 4, 4), 1.0, 20),
        "256 x 32 x 32": (_bench.cosine_scores(256 * 32, 32).view(256, 32, 32), 0.05, 5),
        "4096 x 300": (cosines, 0.05, 3),
        "4096 x 300, one score of -3": (low, 0.05, 3),
        "4096 x 300, [-1, 1], epsilon .04": (cosines / cosines.abs().max(), 0.04, 3),
        "4096 x 300, dots to 27": (30 * cosines, 0.05, 3),
        "4096 x 6": (few, 0.05, 3),
        "4096 x 6, dots to 25": (30 * few, 0.05, 3),
        "512 x 65536": (codes, 0.05, 3),
        "512 x 65536, epsilon .04": (codes, 0.04, 3),
        "64 x 128 x 128": (attention, 0.05, 5),
        "64 x 128 x 128, causal": (attention.masked_fill(causal, -torch.inf), 0.05, 5),
        "64 x 128 x 128, 10 % masked": (attention.masked_fill(random < 0.1, -torch.inf), 0.05, 5),
    }


def gradient_cases() -> dict[str, Case]:
    """Those for gradients through the iterations."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    return {
        "16384 x 4 x 4, 20 iterations": (normal(16384, 4, 4), 1.0, 20),
        "64 x 128 x 128, 5": (0.3 * normal(64, 128, 128), 0.05, 5),
        "8 x 513 x 513, 10": (normal(8, 513, 513), 1.0, 10),
        "8 x 513 x 513, 100": (normal(8, 513, 513), 1.0, 100),
    }


def gradient_row(name: str, case: Case, seconds: float = 2.0) -> list[str]:
    """The cells of one case: milliseconds, the ratio, and the error against float64, relative to the largest entry."""
    narrow = _bench.Case(name, *case)
    wanted = _bench.task(_peers.exp_once, narrow._replace(scores=case[0].double()), backward=True)()
    methods = {"ours": partial(sinkhorn, differentiable=True), "plain": _peers.exp_once}
    methods["implicit"] = partial(sinkhorn, differentiable="implicit")
    calls = {name: _bench.task(method, narrow, backward=True) for name, method in methods.items()}
    error, text = _bench.largest_error(calls["ours"], wanted, wanted.abs().max().item())
    if not error <= _bench.BOUND:
        return [name, _bench.WRONG, "", "", "", text]
    took = thread_medians(calls, seconds)
    times = [f"{took[name] * 1e3:.3g}" for name in ("ours", "implicit", "plain")]
    return [name, *times, f"{took['ours'] / took['plain']:.3f}", text]


def thread_medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each call on this thread, in turns: what others do on the machine counts less."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    until = time.thread_time() + seconds
    while time.thread_time() < until or len(samples[next(iter(calls))]) < 5:
        for name, call in calls.items():
            began = time.thread_time()
            call()
            samples[name].append(time.thread_time() - began)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def row(name: str, case: Case, seconds: float = 2.0) -> list[str]:
    """The cells of one case: milliseconds, the ratio to SwAV's algorithm, and the error against float64."""
    scores, epsilon, num_iters = case
    ours = partial(sinkhorn, scores, epsilon, num_iters, backend="cpu")
    error = (ours().double() - sinkhorn(scores.double(), epsilon, num_iters)).abs().max().item()
    if not error <= _bench.BOUND:
        return [name, _bench.WRONG, "", "", f"{error:.1e}"]
    took = thread_medians({"ours": ours, "swav": partial(_peers.swav, scores, epsilon, num_iters)}, seconds)
    ratio = took["ours"] / took["swav"]
    return [name, f"{took['ours'] * 1e3:.3g}", f"{took['swav'] * 1e3:.3g}", f"{ratio:.3f}", f"{error:.1e}"]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    race.keep_memory()
    print(_bench.environment(torch.device("cpu")))
    rows = [row(name, case) for name, case in cases().items()]
    print(_bench.table(["", "ms", "SwAV's ms", "x SwAV", "error"], rows))
    rows = [gradient_row(name, case) for name, case in gradient_cases().items()]
    head = ["with gradients", "ms", "implicit ms", "unrolled plain torch (exp once) ms", "x unrolled", "error"]
    print(_bench.table(head, rows))


if __name__ == "__main__":
    main()
