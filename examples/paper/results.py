"""Read the results of runs from ``runs.jsonl``, group those that can be compared, and take means over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Run = dict[str, Any]

DATA = {
    "digits": "digits",
    "mnist": "MNIST",
    "fashion": "Fashion-MNIST",
    "cifar10": "CIFAR-10 (JPEG copy)",
    "cifar100": "CIFAR-100",
}
NAMES = {
    "autoencoder": "autoencoder",
    "kmeans": "autoencoder + k-means",
    "vae": "VAE-KL",
    "beta-vae": "beta-VAE",
    "infovae": "InfoVAE",
    "wae": "WAE-MMD",
    "wae-first": "WAE-MMD from the first step",
    "wae-noise": "WAE-MMD from the first step, with noise",
    "vq-vae": "VQ-VAE",
    "algorithm-1-paper": "Algorithm 1, as the paper has it",
    "algorithm-1": "Algorithm 1, our defaults",
    "balanced": "balanced layer (ours)",
    # Those that sample from their best prior.
    "balanced-clusters": "ours",
    "balanced-trained": "ours as trained",
    "kmeans-clusters": "autoencoder + k-means + covariances",
    "autoencoder-gmm": "autoencoder + GMM",
    "rae-gmm": "RAE-L2 + GMM",
    "vae-gmm": "VAE-KL + GMM",
    "wae-gmm": "WAE-MMD from the first step + GMM",
}
SHORT = NAMES | {
    "algorithm-1-paper": "Algorithm 1 (paper)",
    "algorithm-1": "Algorithm 1 (our defaults)",
    "balanced": "balanced (ours)",
}
METHODS = tuple(NAMES)
PROTOTYPICAL = ("algorithm-1-paper", "algorithm-1", "balanced")
PLAIN = ("autoencoder", "vae", "infovae", "wae", "vq-vae")
CURVES = (1, 2, 10, 30)  # curves and reconstructions are shown for these K


class Study(NamedTuple):
    """The settings that its runs share, so that they can be compared."""

    data: str
    model: str
    epochs: int
    split: str  # judged on "test" or "validation" images

    def __str__(self) -> str:
        split = "" if self.split == "test" else f", judged on {self.split} images"
        return f"{self.data}, {self.model}, {self.epochs} epochs{split}"


class Mean(NamedTuple):
    """A mean over seeds. ``present`` of the ``total`` runs have the value. If one value is NaN, the mean is NaN."""

    mean: float
    deviation: float
    present: int
    total: int


def load(results: Path) -> list[Run]:
    """All runs of ``results/runs.jsonl``. If two lines are about one run, the later one counts.

    A ValueError names a bad line.
    """
    latest: dict[str, Run] = {}
    for number, line in enumerate((results / "runs.jsonl").read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            run = named(json.loads(line))
            latest[identity(run)] = run
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"runs.jsonl, line {number}: expected a run, got {line[:60]!r} ({error}).") from None
    return list(latest.values())


def named(run: Run) -> Run:
    """The run, with its method's name in tables.

    A VAE with a beta other than 1 is a beta-VAE. Algorithm 1 has two presets. WAE-MMD is three methods: with a warm-up,
    without one, and without one but with the noise of ours. A run with a fitted prior is a method of its own.
    """
    options = run.get("options") or {}
    method = run["method"]
    if method == "vae" and options.get("beta", 1.0) != 1.0:
        method = "beta-vae"
    if method == "wae" and not options.get("warmup", True):
        method = "wae-noise" if options.get("noise") else "wae-first"
    if method == "algorithm1":
        method = "algorithm-1-paper" if options.get("preset", "paper") == "paper" else "algorithm-1"
    if "prior" in options:
        method = f"{run['method']}-{options['prior']}"
    K = run.get("num_prototypes", options.get("num_prototypes"))
    others = {name: value for name, value in options.items() if name != "num_prototypes"}
    return run | {"method": method, "num_prototypes": K, "options": others}


def fitted(run: Run) -> bool:
    """Whether the run samples from its best prior, and not as the paper does."""
    return "prior" in run["options"]


def identity(run: Run) -> str:
    """A text that names the run. If it is the same for two runs, they are one run."""
    names = ("config", "data", "model", "method", "label", "num_prototypes", "seed", "epochs", "options")
    return json.dumps([run[name] for name in names] + [run.get("split", "test")], sort_keys=True)


def done(run: Run) -> bool:
    return run.get("error") is None and bool(run.get("metrics"))


def data_name(run: Run) -> str:
    """The data set's name in figures and tables. Our CIFAR-10 is a JPEG copy, and its name says so everywhere."""
    return DATA.get(run["data"].lower(), run["data"])


def study_of(run: Run) -> Study:
    return Study(data_name(run), run["model"], run["epochs"], run.get("split", "test"))


def studies(runs: Iterable[Run]) -> dict[Study, list[Run]]:
    """The finished runs of each study, in the order of the methods."""
    found: dict[Study, list[Run]] = {}
    for run in sorted(filter(done, runs), key=_order):
        found.setdefault(study_of(run), []).append(run)
    return found


def _order(run: Run) -> tuple:
    data = list(dict.fromkeys(DATA.values()))
    where = data.index(data_name(run)) if data_name(run) in data else len(data)
    method = METHODS.index(run["method"]) if run["method"] in METHODS else len(METHODS)
    sweep = [_number(run["options"].get(name)) for name in ("sigma", "beta")]
    return where, study_of(run), method, run["num_prototypes"] or 0, sweep, row_name(run), run["seed"]


def _number(option: object) -> float:
    """A sort key: numbers come in their order, and words come last."""
    return float(option) if isinstance(option, int | float) else 0.0 if option is None else math.inf


def rows(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each row of the table, one for each seed."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(row_name(run), []).append(run)
    return found


def row_name(run: Run) -> str:
    name = run.get("label") or NAMES.get(run["method"], run["method"])
    K = run["num_prototypes"]
    return f"{name}, K = {K}" if K and "K = " not in name and "K=" not in name and run["method"] in _WITH_K else name


_WITH_K = (*PROTOTYPICAL, "kmeans")


def base(runs: Iterable[Run], method: str, num_prototypes: int | None = None) -> list[Run]:
    """The runs of a method at K, without those that vary an option.

    The method's usual options are those with the most K.
    """
    by_options: dict[str, list[Run]] = {}
    for run in runs:
        if run["method"] == method:
            by_options.setdefault(json.dumps(run["options"], sort_keys=True), []).append(run)
    if not by_options:
        return []

    def breadth(some: list[Run]) -> tuple[int, int, int]:
        return len({run["num_prototypes"] for run in some}), -len(some[0]["options"]), len(some)

    usual = max(by_options.values(), key=breadth)
    return [run for run in usual if num_prototypes is None or run["num_prototypes"] == num_prototypes]


def prototype_counts(runs: Iterable[Run], method: str) -> list[int]:
    """All K of a method."""
    return sorted({run["num_prototypes"] for run in base(runs, method)})


def value(run: Run, metric: str) -> float | None:
    """A metric of a run, or None if the run does not have it."""
    found = run["metrics"].get(metric, run.get(metric))
    return None if found is None else float(found)


def mean_of(runs: list[Run], metric: str) -> Mean | None:
    """The mean and the sample deviation over seeds, or None if no run has the metric."""
    return mean_over([value(run, metric) for run in runs])


def mean_over(values: list[float | None]) -> Mean | None:
    present = [v for v in values if v is not None]
    if not present:
        return None
    if not all(map(math.isfinite, present)):
        return Mean(math.nan, math.nan, len(present), len(values))
    deviation = statistics.stdev(present) if len(present) > 1 else math.nan
    return Mean(statistics.fmean(present), deviation, len(present), len(values))


def ratio(runs: list[Run], to: list[Run], metric: str) -> Mean | None:
    """The mean over seeds of metric / metric of the run ``to`` with the same seed, or None without a common seed."""
    other = {run["seed"]: value(run, metric) for run in to}
    pairs = [(value(run, metric), other.get(run["seed"])) for run in runs]
    return mean_over([a / b if a is not None and b else None for a, b in pairs])


def arrays_of(runs: list[Run], results: Path) -> dict[str, np.ndarray] | None:
    """The arrays of the first seed that has any, or None."""
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run.get("arrays") and (results / run["arrays"]).exists():
            with np.load(results / run["arrays"]) as file:
                return dict(file)
    return None


def written(found: Mean | None, spec: str = ".3f") -> str:
    """``mean ± deviation``, or a dash if there is no value. If a seed lacks the value, the text says so."""
    if found is None:
        return "–"
    if math.isnan(found.mean):
        return "NaN"
    text = f"{found.mean:{spec}}"
    if found.deviation > 0:  # NaN for a single seed, 0 if the seed has no effect
        text += f" ± {found.deviation:{spec}}"
    return text + (f" ({found.present} of {found.total})" if found.present < found.total else "")
