"""Every backend and every peer on this machine: ``python tests/benchmarks/sinkhorn_table.py``.

    pip install -e ".[bench]" && pip install --no-deps lightly
    python tests/benchmarks/sinkhorn_table.py --threads 1 --robustness --markdown table.md --plot table.png

All methods get the same scores in one process. The figures are medians over interleaved rounds. A method is timed only
if it agrees with float64 at the same iterate. A copy is ``Tensor.copy_`` into an existing tensor.
``python -m proto_reg bench`` comes with the package and times our backends alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import sinkhorn_peers
import sinkhorn_race as race
import torch
from sinkhorn_race import COPY, SWAV, Contender, Result
from sinkhorn_robustness import robustness
from torch import Tensor

from proto_reg import _bench, functional

TEMPERATURE = 0.1
SHAPES = ((256, 10), (256, 30), (256, 50), (4096, 300), (2048, 3000), (8192, 3000), (1024, 65536))
EAGER = "eager autograd"
Results = dict[tuple[int, int], list[Result]]


def codes_results(scores: Tensor, arguments: argparse.Namespace) -> tuple[list[Result], dict[str, str]]:
    """Time the step from scores to codes for ours, the floors and the peers. Return also the missing peers."""
    error = partial(race.largest_error, expected=_bench.reference(scores))
    found, missing = sinkhorn_peers.peers(scores) if not arguments.no_peers else ({}, {})
    if arguments.compile:
        found["torch.compile of SwAV's"] = sinkhorn_peers.compiled_swav(scores)
    entered = race.contenders(scores) + [Contender(name, partial(call, scores)) for name, call in found.items()]
    results = race.compete(entered, error, scores.device, seconds=arguments.seconds, limit=arguments.limit)
    return results, missing


def loss_results(scores: Tensor, arguments: argparse.Namespace) -> list[Result]:
    """Time the step from scores to loss and gradient: ours in one pass, and eager autograd over SwAV's algorithm."""
    scores = scores.clone().requires_grad_()
    entered = [Contender(EAGER, partial(_differentiate, _eager_loss, scores))]
    options: dict[str, Any] = {"epsilon": _bench.EPSILON, "num_iters": _bench.NUM_ITERS, "temperature": TEMPERATURE}
    for name in _bench.usable_backends(scores.device):
        options["backend"] = name
        call = partial(_differentiate, partial(functional.sinkhorn_cross_entropy, **options), scores)
        entered.append(Contender(f"proto_reg {name}", call, _bench.BOUND))
        call = partial(functional.sinkhorn_cross_entropy_and_gradient, scores.detach(), **options)
        entered.append(Contender(f"proto_reg {name}, closed form", call, _bench.BOUND))
    error = _loss_error(scores.detach())
    return race.compete(entered, error, scores.device, seconds=arguments.seconds, limit=arguments.limit)


def _differentiate(function: Callable[[Tensor], Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    loss = function(scores)
    return loss.detach(), *torch.autograd.grad(loss, scores)


def _eager_loss(scores: Tensor) -> Tensor:
    codes = race.swav(scores.detach())
    return -(codes * (scores / TEMPERATURE).log_softmax(1)).sum(1).mean()


def _loss_error(scores: Tensor) -> Callable[[object], float]:
    """The larger one of two errors: the relative one of the loss, and that of p - q, the gradient times tau B."""
    codes, log_p = _bench.reference(scores), (scores.double() / TEMPERATURE).log_softmax(1)
    expected = -(codes * log_p).sum(1).mean().item()
    difference = log_p.exp_().sub_(codes)

    def error(output: object) -> float:
        loss, gradient = output[:2]
        of_gradient = race.largest_error(gradient.double() * (TEMPERATURE * len(scores)), difference)
        # A NaN in one of them must be the result. max() would return it only as its first argument.
        return math.nan if math.isnan(loss) else max(of_gradient, abs(loss.item() / expected - 1))

    return error


def targets(name: str, rows: int, columns: int, *, of_loss: bool) -> list[tuple[float, str]]:
    """The promises for a contender on one CPU thread, as pairs (largest ratio, base)."""
    elements = rows * columns
    if of_loss:
        return [(0.15 if rows <= 256 else 0.25, EAGER)] if name.startswith("proto_reg cpu") else []
    if name == "proto_reg torch":
        return [(0.75, SWAV)]
    if not name.startswith("proto_reg cpu"):
        return []
    promised = [(0.10 if elements <= 256 * 50 else 0.20 if elements <= 4096 * 300 else 0.25, SWAV)]
    # Codes for an existing tensor take at least the time of a copy into it.
    return [*promised, (3.5, COPY)] if name.endswith("out=") else promised


def judged(
    results: list[Result], size: tuple[int, int], arguments: argparse.Namespace, *, of_loss: bool = False
) -> list[list[str]]:
    """The rows of ``race.result_rows``. The last cell says which targets are met or missed."""
    rows = race.result_rows(results, EAGER if of_loss else SWAV)
    for result, row in zip(results, rows, strict=True):
        verdicts = []
        promised = targets(result.name, *size, of_loss=of_loss) if arguments.threads == 1 else []
        for bound, base in promised if arguments.device == "cpu" else []:
            met = race.ratio(results, result.name, base) <= bound
            unit = " copies" if base == COPY else ""
            verdicts.append(f"<= {bound:.2f}{unit} {'met' if met else 'MISSED'}")
        row.append(", ".join(verdicts))
    return rows


def summary(results: Results, base: str) -> str:
    """The ratios to the time of ``base``. A row is a contender, a column is a shape."""
    names = list(dict.fromkeys(result.name for column in results.values() for result in column))
    rows = []
    for name in names:
        cells = []
        for column in results.values():
            notes = {result.name: result.note for result in column}
            note = notes.get(name, "")
            cells.append(note.split(":")[0] if note else race.number(race.ratio(column, name, base)))
        rows.append([name, *cells])
    return _bench.table([f"x {base}", *("{} x {}".format(*size) for size in results)], rows)


def plot(results: Results, path: Path, title: str) -> None:
    """Draw the ratios to SwAV's algorithm by shape. Each contender has a line with its name at the right end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    shapes = list(results)
    timed = (result.name for column in results.values() for result in column if not result.note)
    names = [name for name in dict.fromkeys(timed) if name != race.CLONE]
    ours = itertools.cycle(["#c1121f", "#f4845f", "#780000", "#e09f3e", "#9d0208"])
    theirs = itertools.cycle(["#3d5a80", "#5fa8d3", "#5c7c5c", "#8d6a9f", "#2a9d8f", "#7f7f7f", "#a98467", "#4c4c9d"])
    ends = {}
    for name in names:
        values = [race.ratio(column, name, SWAV) for column in results.values()]
        is_ours = name.startswith("proto_reg")
        style = {"linewidth": 2.4 if is_ours else 1.2, "marker": "o"}
        if name in (SWAV, COPY):
            style |= {"color": "black" if name == SWAV else "#999999", "marker": "", "linestyle": "--"}
        else:
            style["color"] = next(ours if is_ours else theirs)
        axes.plot(range(len(shapes)), values, markersize=5 if is_ours else 3, zorder=3 if is_ours else 2, **style)
        ends[name] = ([value for value in values if not math.isnan(value)][-1], style["color"])
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), ["{}\nx {}".format(*size) for size in shapes])
    axes.set_xlim(-0.2, len(shapes) - 0.8)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.grid(axis="y", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("time / time of SwAV's algorithm")
    axes.set_xlabel(title, fontsize=7, color="#666666")
    axes.set_title(f"Scores to codes, {_bench.NUM_ITERS} Sinkhorn iterations, float32: lower is faster", loc="left")
    _name_lines(axes, ends)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _name_lines(axes, ends: dict[str, tuple[float, str]]) -> None:
    """Write the names beside the right ends of the lines. Names that would overlap are moved apart."""
    names = sorted(ends, key=lambda name: ends[name][0])
    heights = [math.log10(ends[name][0]) for name in names]
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    gap = (high - low) / 21
    for _ in range(200):
        for i in range(len(heights) - 1):
            overlap = max(0.0, gap - (heights[i + 1] - heights[i]))
            heights[i], heights[i + 1] = heights[i] - overlap / 2, heights[i + 1] + overlap / 2
    for name, height in zip(names, heights, strict=True):
        weight = "bold" if name.startswith("proto_reg") else "normal"
        right = axes.get_xlim()[1] + 0.06
        axes.text(right, 10**height, name, color=ends[name][1], fontsize=8, weight=weight, va="center", clip_on=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description, _, details = __doc__.partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=details, formatter_class=layout)
    shapes = {"nargs": "+", "type": _bench.shape, "default": SHAPES, "metavar": "BxK"}
    parser.add_argument("--shapes", **shapes, help="e.g. 256x30 4096x300")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads on the CPU (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=8.0, help="approximate time for a table (default: 8)")
    parser.add_argument("--fresh-memory", action="store_true", help="do not reuse freed memory: more page faults")
    parser.add_argument("--limit", type=float, default=20.0, help="skip calls that take more seconds (default: 20)")
    parser.add_argument("--compile", action="store_true", help="also compile SwAV's algorithm, which takes minutes")
    parser.add_argument("--no-peers", action="store_true", help="only ours, SwAV's algorithm and a copy")
    parser.add_argument("--robustness", action="store_true", help="also a table of all methods on hard scores")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios to SwAV's algorithm")
    return parser.parse_args(argv)


def robustness_table(device: torch.device) -> str:
    """A Markdown table of ours, SwAV's algorithm and the peers on hard scores (256 x 30)."""
    scores = _bench.cosine_scores(256, 30, device)
    found, _ = sinkhorn_peers.peers(scores)
    methods = {f"proto_reg {name}": partial(_ours, name) for name in _bench.usable_backends(device)}
    methods["proto_reg, nan_policy='isolate'"] = partial(_ours, "auto", nan_policy="isolate")
    return _bench.table(*robustness({**methods, SWAV: race.swav, **found}, device))


def _ours(backend: str, scores: Tensor, **options: str) -> Tensor:
    return functional.sinkhorn(scores, _bench.EPSILON, _bench.NUM_ITERS, backend=backend, **options)


def begin(arguments: argparse.Namespace) -> str:
    """Set threads and memory by ``arguments``. Return the lines above every table."""
    torch.set_num_threads(arguments.threads)
    if not arguments.fresh_memory:
        race.keep_memory()
    memory = "as the C library has it" if arguments.fresh_memory else "kept and reused"
    return f"{_bench.environment(torch.device(arguments.device))}\n{_bench.SETTING}; freed memory {memory}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables. Return 1 if one of our backends failed its check, else 0."""
    arguments = parse(argv)
    device = torch.device(arguments.device)
    heading = begin(arguments)
    print(heading, flush=True)
    codes, losses, sections, missing = Results(), Results(), [], {}
    header = ["", "ms", "x SwAV", "x copy", "error", "target"]
    for size in arguments.shapes:
        scores = _bench.cosine_scores(*size, device)
        needed = 16 * 8 * scores.numel()
        if device.type == "cpu" and needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            print(f"{size}: skipped, may need {needed / 2**30:.0f} GiB")
            continue
        codes[size], missing = codes_results(scores, arguments)
        text = "### {} x {}\n\n".format(*size) + _bench.table(header, judged(codes[size], size, arguments))
        if loss := loss_results(scores, arguments):
            losses[size] = loss
            rows = [row[:3] + row[4:] for row in judged(loss, size, arguments, of_loss=True)]
            text += "\n\nScores to loss and gradient:\n\n"
            text += _bench.table(["", "ms", "x eager", "error", "target"], rows)
        sections.append(text)
        print(f"\n{text}", flush=True)
    closing = [summary(codes, SWAV), *([f"Scores to loss and gradient:\n\n{summary(losses, EAGER)}"] if losses else [])]
    if arguments.robustness:
        closing.append(f"ok: finite, rows sum to 1, error below 1e-3 (half: 5e-3)\n\n{robustness_table(device)}")
    closing += [f"{name}: {why}" for name, why in missing.items()]
    print("", *closing, sep="\n\n")
    if arguments.markdown:
        arguments.markdown.write_text("\n\n".join([heading, *closing, *sections]) + "\n")
    if arguments.plot:
        plot(codes, arguments.plot, _bench.environment(device).split(", load")[0])
    every = [result for table in (codes, losses) for results in table.values() for result in results]
    return int(any(result.note and result.name.startswith("proto_reg") for result in every))


if __name__ == "__main__":
    sys.exit(main())
