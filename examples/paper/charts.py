"""Figures of numbers from the runs' records: the paper's figure 6, the frontier, the limit cycle and the bandwidth.

Each function returns a Figure, or None if no run has the numbers for it.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from . import rivals
from .results import CURVES, PLAIN, PROTOTYPICAL, SHORT, Mean, Run, arrays_of, base, mean_of, rows, value
from .verdicts import bandwidths, control_of

COLOURS = {
    "autoencoder": "black",
    "kmeans": "tab:gray",
    "vae": "tab:brown",
    "beta-vae": "tab:olive",
    "infovae": "tab:pink",
    "wae": "tab:purple",
    "wae-first": "indigo",
    "wae-noise": "mediumorchid",
    "vq-vae": "tab:cyan",
    "algorithm-1-paper": "tab:red",
    "algorithm-1": "tab:orange",
    "balanced": "tab:blue",
    "rae": "tab:green",
}
MARKERS = dict(zip(COLOURS, "oPsdDXpHv<>*^", strict=True))


def curves(runs: list[Run]) -> Figure | None:
    """Figure 6: training errors are on the left, test errors on the right."""
    groups = [(SHORT[m], m, 0.0, base(runs, m)) for m in PLAIN]
    for method in PROTOTYPICAL:
        counts = [K for K in CURVES if base(runs, method, K)]
        shades = np.linspace(0, 0.65, len(counts))[::-1]  # the largest K has the full colour
        groups += [
            (f"{SHORT[method]}, K = {K}", method, shade, base(runs, method, K))
            for K, shade in zip(counts, shades, strict=True)
        ]
    groups = [group for group in groups if any(run.get("history") for run in group[3])]
    if not groups:
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, split in ((left, "train"), (right, "test")):
        for name, method, shade, some in groups:
            colour = _lighter(COLOURS[method], shade)
            _curve(axis, some, f"{split}_mse", name, colour)
        axis.set(yscale="log", xlabel="epoch")
        axis.set_title("training images" if split == "train" else "test images", fontsize=10)
        plain_ticks(axis.yaxis)
        axis.grid(alpha=0.3, which="both")
    left.set_ylabel("MSE per pixel")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return figure


def _curve(axis: Axes, runs: list[Run], metric: str, name: str, colour: tuple[float, ...]) -> None:
    histories = [run["history"] for run in runs if run.get("history")]
    epochs = [point["epoch"] for point in min(histories, key=len)]
    values = np.array([[point[metric] for point in history[: len(epochs)]] for history in histories])
    axis.plot(epochs, values.mean(0), color=colour, linewidth=1.3, label=name)
    axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    return tuple(rgb + share * (1 - rgb))


def frontier(runs: list[Run]) -> Figure | None:
    """Control and standardised MMD over test MSE. Methods with a K are shown at K = 30."""
    points = []
    for name, some in rows(runs).items():
        method = some[0]["method"]
        error, right, regular = mean_of(some, "test_mse"), control_of(some), mean_of(some, "standardised_mmd")
        usual = method == "beta-vae" or some[0] in base(runs, method)
        if error and right and usual and some[0]["num_prototypes"] in (None, 30):
            points.append((name, method, error, right, regular))
    if not points:
        return None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right_axis = figure.subplots(1, 2, sharex=True)
    betas = [name for name, *_ in points if "beta = " in name]
    for name, method, error, right, regular in points:
        # Names are in turn below and above their marks, because large betas end in the same place. On the right the
        # order is reversed, because small betas are above ours there.
        offsets = (8, -13) if name in betas and betas.index(name) % 2 else (-13, 8)
        _point(left, error, right, method, name, offsets[0])
        if regular:
            _point(right_axis, error, regular, method, name, offsets[1])
    for axis in (left, right_axis):
        axis.set(xlabel="test MSE per pixel", xscale="log")
        axis.margins(x=0.12)
        axis.grid(alpha=0.3, which="both")
        plain_ticks(axis.xaxis)
    left.set(ylabel="control accuracy", ylim=(0, 1.04))
    left.set_title("upper left is best", fontsize=10)
    right_axis.set(ylabel="standardised MMD")
    right_axis.set_title("lower left is best", fontsize=10)
    right_axis.set_yscale("symlog", linthresh=3, linscale=0.4)
    # The means set the limits. A deviation larger than its mean would stretch the logarithmic axis over empty decades.
    means = [regular.mean for *_, regular in points if regular]
    right_axis.set_ylim(min([-4.0, *(2 * y for y in means)]), max([4.0, *(2 * y for y in means)]))
    right_axis.yaxis.set_major_locator(
        FixedLocator([-100, -30, -10, -3, 0, *(c * 10**n for n in range(5) for c in (3, 10))])
    )
    right_axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    right_axis.axhspan(-3, 3, color="tab:green", alpha=0.12, linewidth=0, label="null ± 3 deviations")
    parts = [axis.get_legend_handles_labels() for axis in (left, right_axis)]
    entries = {label: handle for handles, labels in parts for handle, label in zip(handles, labels, strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def spreads(runs: list[Run]) -> Figure | None:
    """Control over recall along the spread of the draw: a curve for each method with its best prior."""
    curves = {
        method: rivals.frontier(base(runs, method)) for method in (rivals.OURS, rivals.AS_TRAINED, *rivals.RIVALS)
    }
    curves = {method: points for method, points in curves.items() if points}
    if not curves:
        return None
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axis = figure.subplots()
    for method, points in curves.items():
        colour, ours = COLOURS[method.split("-")[0]], method == rivals.OURS
        recall, right = zip(*points, strict=True)
        style = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 2.5 if ours else 1.3}
        style["linestyle"] = "--" if method == rivals.AS_TRAINED else "-"
        axis.plot(recall, right, label=SHORT[method], **style)
        usual = rivals.frontier_at(base(runs, method), 1.0)
        if usual is not None:
            axis.plot(*usual, color=colour, marker="*" if ours else "s", markersize=14 if ours else 8, linestyle="")
    axis.set(xlabel="recall", ylabel="control")
    axis.set_title("upper right is best; the large mark is the draw with spread 1", fontsize=10)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def _point(axis: Axes, x: Mean, y: Mean, method: str, name: str, offset: int) -> None:
    """Draw a method with its deviations. Its mark is hollow if it has no prototypes of its own.

    The beta of a beta-VAE is ``offset`` points above the mark.
    """
    axis.errorbar(
        x.mean,
        y.mean,
        xerr=np.nan_to_num(x.deviation),
        yerr=np.nan_to_num(y.deviation),
        color=COLOURS[method],
        marker=MARKERS[method],
        markersize=15 if method == "balanced" else 8,
        markerfacecolor=COLOURS[method] if method in (*PROTOTYPICAL, "kmeans") else "white",
        linestyle="",
        capsize=2,
        label=SHORT[method],
    )
    if "beta = " in name:
        beta = name.split("beta = ")[1]
        axis.annotate(f"β = {beta}", (x.mean, y.mean), (0, offset), textcoords="offset points", fontsize=7, ha="center")


def plain_ticks(axis: Axis) -> None:
    """Write 1, 2 and 5 of each decade as ticks. If the axis spans less than a decade, it has more ticks."""
    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 5, 7)
    # LogLocator is not used. If it finds fewer than two ticks, it makes linear ticks that overlap.
    axis.set_major_locator(FixedLocator([c * 10.0**n for n in range(-9, 9) for c in steps]))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


PHASES = {
    "before": ("black", "before the batch"),
    "prototype": ("tab:blue", "after the prototype step"),
    "mmd": ("tab:orange", "after the MMD step"),
    "reconstruction": ("tab:green", "after the reconstruction step"),
    "all": ("tab:olive", "after the only step"),
}


def limit_cycle(runs: list[Run], results: Path, shown: int = 10) -> Figure | None:
    """The MSE before and after each optimizer's step, for the last batches and for all. Each method has a line."""
    found = {}
    for method in (*PROTOTYPICAL, "autoencoder"):
        everything = [arrays_of([run], results) for run in base(runs, method)]
        traced = [arrays for arrays in everything if arrays and "trace" in arrays]
        if traced:
            found[method] = traced[0]
    if not found:
        return None
    figure = Figure(figsize=(10, 2.1 * len(found) + 0.8), layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False, width_ratios=[3, 2], sharey=True)
    for (left, right), (method, arrays) in zip(grid, found.items(), strict=True):
        trace, phases = arrays["trace"], [str(name) for name in arrays["trace_steps"]]
        _sawtooth(left, trace[-shown:], phases)
        left.set(ylabel="MSE per pixel")
        left.set_title(f"{SHORT[method]}: the last {min(shown, len(trace))} batches", fontsize=10)
        style = {"widths": 0.6, "showfliers": False, "medianprops": {"color": "black"}, "patch_artist": True}
        for box, phase in zip(right.boxplot(list(trace.T), **style)["boxes"], phases, strict=True):
            box.set(facecolor=PHASES[phase][0], alpha=0.5)
        right.set_xticks([])
        right.set_xlim(0.4, 4.6)
        right.set_title(f"all {len(trace)} batches", fontsize=10)
        right.grid(alpha=0.3, axis="y", which="both")
    used = {phase: 0 for arrays in found.values() for phase in map(str, arrays["trace_steps"])}
    handles = [Line2D([], [], marker="o", linestyle="", color=PHASES[p][0], label=PHASES[p][1]) for p in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def _sawtooth(axis: Axes, trace: np.ndarray, phases: list[str]) -> None:
    """Draw ``trace`` (batches, phases) in the order of time."""
    x = np.arange(len(trace))[:, None] + np.linspace(0.1, 0.9, trace.shape[1])
    axis.plot(x.ravel(), trace.ravel(), color="0.75", linewidth=1, zorder=1)
    for column, phase in enumerate(phases):
        axis.scatter(x[:, column], trace[:, column], color=PHASES[phase][0], s=16, zorder=2)
    for batch in range(1, len(trace), 2):
        axis.axvspan(batch, batch + 1, color="0.95", zorder=0)
    axis.set(yscale="log", xlim=(0, len(trace)), xticks=[])
    plain_ticks(axis.yaxis)
    axis.grid(alpha=0.3, axis="y", which="both")


def bandwidth(runs: list[Run]) -> Figure | None:
    """Test MSE and r^2/D over the bandwidth of the paper's MMD. Each seed is a point."""
    sweep, plain = bandwidths(runs), mean_of(base(runs, "autoencoder"), "test_mse")
    if len(sweep) < 2:
        return None
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, metric, label in (
        (left, "test_mse", "test MSE per pixel"),
        (right, "r2_per_dim", "r²/D on test latents"),
    ):
        for sigma, some in sweep.items():
            values = [v for run in some if (v := value(run, metric)) is not None]
            axis.scatter([sigma] * len(values), values, color=COLOURS["algorithm-1-paper"], s=18)
        means = {sigma: found.mean for sigma, some in sweep.items() if (found := mean_of(some, metric))}
        axis.plot(list(means), list(means.values()), color=COLOURS["algorithm-1-paper"], label="Algorithm 1 (paper)")
        axis.set(xscale="log", yscale="log", xlabel="bandwidth σ", ylabel=label)
        axis.set_xticks(list(sweep), [f"{sigma:g}" for sigma in sweep], minor=False)
        axis.set_xticks([], minor=True)
        plain_ticks(axis.yaxis)
        axis.grid(alpha=0.3, which="both")
    if plain:
        left.axhline(plain.mean, color="black", linestyle="--", linewidth=1, label="autoencoder")
    right.axhline(1, color="black", linestyle="--", linewidth=1, label="N(v, I)")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure
