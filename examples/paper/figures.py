"""The paper's figures 2 to 6 and three of ours, from the runs' JSON and arrays alone.

Each function returns a Figure, or None where no run left what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from .results import (
    NAMES,
    PROTOTYPICAL,
    Mean,
    Run,
    Study,
    arrays_of,
    base,
    mean_of,
    prototype_counts,
    rows,
    value,
)
from .verdicts import bandwidths, control_of

COLOURS = {
    "autoencoder": "black",
    "kmeans": "tab:gray",
    "vae": "tab:brown",
    "beta-vae": "tab:olive",
    "infovae": "tab:pink",
    "wae": "tab:purple",
    "vq-vae": "tab:cyan",
    "algorithm-1-paper": "tab:red",
    "algorithm-1": "tab:orange",
    "balanced": "tab:blue",
}
MARKERS = dict(zip(COLOURS, "oPsdDXv<>*", strict=True))
SHORT = NAMES | {
    "algorithm-1-paper": "Algorithm 1 (paper)",
    "algorithm-1": "Algorithm 1 (our defaults)",
    "balanced": "balanced (ours)",
}
SHOWN = (1, 2, 5, 10, 20, 30, 50)  # the paper's K
CURVES = (1, 2, 10, 30)
PLAIN = ("autoencoder", "vae", "infovae", "wae", "vq-vae")


def mosaic(images: np.ndarray, columns: int, gap: int = 2, fill: int = 255) -> np.ndarray:
    """Bytes (n, C, H, W) as one picture of so many columns, (rows * H, columns * W) or with three colours last."""
    images = enlarged(images)
    n, channels, height, width = images.shape
    lines = -(-n // columns)
    picture = np.full((lines * (height + gap) - gap, columns * (width + gap) - gap, channels), fill, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        picture[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return picture[..., 0] if channels == 1 else picture


def enlarged(images: np.ndarray) -> np.ndarray:
    """Small images at a whole multiple of their size, so that gaps and frames suit all."""
    scale = max(1, 28 // images.shape[-1])
    return images.repeat(scale, -1).repeat(scale, -2)


def show(axis: Axes, picture: np.ndarray) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def draw_all(study: Study, runs: list[Run], results: Path) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of everything that these runs can show."""
    drawers: list[tuple[str, str, Callable[[], Figure | None]]] = [
        (
            "frontier",
            "Reconstruction, control and regularity of every method, K = 30, mean and deviation over seeds. "
            "Standardised MMD: how far held-out latents are from the normal distributions that samples are drawn from, "
            "in standard deviations of the null. Hollow: no prototypes of its own; samples are drawn around k-means "
            "centres, with the better of unit noise and the clusters' own spread.",
            lambda: frontier(runs),
        ),
        ("figure-2", "Decoded prototypes for each K (the paper's figure 2).", lambda: decoded(runs, results)),
        (
            "figure-3",
            "t-SNE of test latents, coloured by class; stars: prototypes (the paper's figure 3).",
            lambda: latent_maps(runs, results),
        ),
        (
            "figure-5",
            "Reconstructions of test images, the first of each class, and the MSE over the whole test set (the "
            "paper's figure 5).",
            lambda: reconstructions(runs, results),
        ),
        (
            "figure-6",
            "Error on training and test images after each epoch, mean over seeds; bands from the lowest seed to the "
            "highest (the paper's figure 6).",
            lambda: curves(runs),
        ),
        (
            "limit-cycle",
            "What each of Algorithm 1's three optimizers does to the reconstruction: MSE of the same images before and "
            "after each step, once training is over; below, methods that take one step a batch.",
            lambda: limit_cycle(runs, results),
        ),
        (
            "bandwidth",
            "Test error and radius of the clusters over the bandwidth of the MMD, a point a seed.",
            lambda: bandwidth(runs),
        ),
    ]
    for method in ("balanced", "algorithm-1-paper", "kmeans"):
        drawers.append(
            (
                f"figure-4-{method}",
                f"{NAMES[method]}: decoded prototypes in red frames and samples of N(v, I) around each; all K = 30 "
                "shown, none picked (the paper's figure 4 shows ten picked by hand).",
                lambda method=method: noise(base(runs, method, 30), results),
            )
        )
    for name, caption, draw in drawers:
        figure = draw()
        if figure is not None:
            figure.suptitle(str(study), fontsize=9, color="0.4")
            yield name, caption, figure


def decoded(runs: list[Run], results: Path, columns: int = 10) -> Figure | None:
    """Figure 2: a column a method, a block a K."""
    found = {}
    for method in PROTOTYPICAL:
        images = {K: arrays_of(base(runs, method, K), results) for K in prototype_counts(runs, method) if K in SHOWN}
        if len(images) > 1 and any(images.values()):  # a column for a single K would be blank
            found[method] = {K: arrays["prototypes"] for K, arrays in images.items() if arrays}
    if not found:
        return None
    counts = sorted({K for images in found.values() for K in images})
    lines = [-(-K // columns) for K in counts]
    figure = Figure(figsize=(4.4 * len(found) + 0.5, 0.43 * sum(lines) + 0.12 * len(lines) + 0.7), layout="constrained")
    figure.get_layout_engine().set(wspace=0.03)
    grid = figure.subplots(len(counts), len(found), squeeze=False, height_ratios=lines)
    for column, (method, images) in enumerate(found.items()):
        grid[0][column].set_title(SHORT[method], fontsize=10)
        for row, K in enumerate(counts):
            axis = grid[row][column]
            axis.set_axis_off()
            if K in images:
                axis.set_axis_on()
                filled = _padded(images[K], columns)
                show(axis, mosaic(filled, columns))
                axis.set_anchor("NW")
                if column == 0:
                    axis.set_ylabel(f"K = {K}", rotation=0, ha="right", va="center", fontsize=9)
    return figure


def _padded(images: np.ndarray, columns: int) -> np.ndarray:
    """White images up to a full line, so that all mosaics are as wide."""
    missing = -len(images) % columns
    return np.concatenate([images, np.full((missing, *images.shape[1:]), 255, np.uint8)])


def noise(runs: list[Run], results: Path, blocks: int = 3) -> Figure | None:
    """Figure 4 of one method: a line a prototype, in blocks side by side."""
    arrays = arrays_of(runs, results)
    if arrays is None or "noise" not in arrays:  # the largest array: kept results may lack it
        return None
    prototypes, samples = arrays["prototypes"], arrays["noise"]
    columns = samples.shape[1] + 1
    lines = -(-len(prototypes) // blocks)
    figure = Figure(figsize=((0.42 * columns + 0.3) * blocks, 0.42 * lines + 0.4), layout="constrained")
    height, width = enlarged(prototypes).shape[-2:]
    for block, axis in enumerate(figure.subplots(1, blocks, squeeze=False)[0]):
        some = slice(block * lines, (block + 1) * lines)
        together = np.concatenate([prototypes[some, None], samples[some]], 1)
        if len(together) == 0:
            axis.set_axis_off()
            continue
        show(axis, mosaic(together.reshape(-1, *prototypes.shape[1:]), columns))
        axis.set_anchor("N")
        for i in range(len(together)):
            frame = matplotlib.patches.Rectangle(
                (-0.5, i * (height + 2) - 0.5), width, height, fill=False, edgecolor="tab:red", linewidth=1.5
            )
            axis.add_patch(frame)
        axis.set_yticks(
            np.arange(len(together)) * (height + 2) + height / 2, range(some.start, some.start + len(together))
        )
        axis.tick_params(length=0, labelsize=6)
    return figure


def latent_maps(runs: list[Run], results: Path, counts: tuple[int, ...] = (1, 10, 30, 50)) -> Figure | None:
    """Figure 3: baselines in the first column, then a line a method and a column a K."""
    methods = [
        m for m in ("algorithm-1-paper", "balanced") if any(arrays_of(base(runs, m, K), results) for K in counts)
    ]
    baselines = [m for m in ("autoencoder", "vae") if arrays_of(base(runs, m), results)]
    if not methods and not baselines:
        return None
    height = max(len(methods), len(baselines))
    used = [K for K in counts if any(arrays_of(base(runs, m, K), results) for m in methods)]
    figure = Figure(figsize=(2.3 * (len(used) + 1), 2.35 * height + 0.5), layout="constrained")
    grid = figure.subplots(height, len(used) + 1, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for row, method in enumerate(baselines):
        _scatter(grid[row][0], base(runs, method), results, SHORT[method])
    for row, method in enumerate(methods):
        for column, K in enumerate(used, 1):
            _scatter(grid[row][column], base(runs, method, K), results, f"{SHORT[method]}, K = {K}")
    classes = int(max(arrays_of(base(runs, m), results)["tsne_labels"].max() for m in [*baselines, *methods])) + 1
    if classes <= 10:
        colours = matplotlib.colormaps["tab10"]
        handles = [Line2D([], [], marker="o", linestyle="", color=colours(c), label=str(c)) for c in range(classes)]
        figure.legend(handles=handles, loc="outside lower center", ncols=classes, fontsize=8, frameon=False)
    return figure


def _scatter(axis: Axes, runs: list[Run], results: Path, title: str) -> None:
    arrays = arrays_of(runs, results)
    if arrays is None:
        return
    plane, labels = arrays["tsne"].astype(np.float32), arrays["tsne_labels"]
    few = labels.max() < 10
    axis.set_axis_on()
    axis.scatter(*plane.T, c=labels, cmap="tab10" if few else "nipy_spectral", vmin=0, vmax=9 if few else None, s=2.5)
    if runs[0]["method"] in PROTOTYPICAL:
        stars = arrays["tsne_prototypes"].astype(np.float32)
        axis.scatter(*stars.T, marker="*", s=45, color="black", edgecolor="white", linewidth=0.5)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)
    axis.spines[:].set_color("0.8")


def reconstructions(runs: list[Run], results: Path) -> Figure | None:
    """Figure 5: a line a model, the images first."""
    groups = {SHORT[method]: base(runs, method) for method in PLAIN}
    for method in PROTOTYPICAL:
        groups |= {f"{SHORT[method]}, K = {K}": base(runs, method, K) for K in CURVES}
    found = {name: (arrays_of(some, results), mean_of(some, "test_mse")) for name, some in groups.items()}
    found = {name: (arrays, mse) for name, (arrays, mse) in found.items() if arrays and mse}
    if not found:
        return None
    first = next(iter(found.values()))[0]
    lines = [("test images", first["inputs"], None)]
    lines += [(name, arrays["reconstructions"], mse) for name, (arrays, mse) in found.items()]
    figure = Figure(figsize=(0.5 * len(first["inputs"]) + 2.8, 0.5 * len(lines) + 0.4), layout="constrained")
    for axis, (name, images, mse) in zip(figure.subplots(len(lines), 1, squeeze=False)[:, 0], lines, strict=True):
        show(axis, mosaic(images, len(images)))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        text = "test MSE" if mse is None else f"{mse.mean:.5f}"
        axis.text(1.01, 0.5, text, transform=axis.transAxes, va="center", fontsize=8)
    return figure


def curves(runs: list[Run]) -> Figure | None:
    """Figure 6: training errors on the left, test errors on the right."""
    groups = [(SHORT[m], m, 0.0, base(runs, m)) for m in PLAIN]
    for method in PROTOTYPICAL:
        counts = [K for K in CURVES if base(runs, method, K)]
        shades = np.linspace(0, 0.65, len(counts))[::-1]  # the largest K, or the only one, in full colour
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
    """Control and standardised MMD over test MSE; K = 30 of the methods that have a K."""
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
        # One below, the next above its mark: large betas end in the same place.
        offset = 0 if name not in betas else 8 if betas.index(name) % 2 else -13
        _point(left, error, right, method, name, offset)
        if regular:
            _point(right_axis, error, regular, method, name, offset)
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
    right_axis.yaxis.set_major_locator(
        FixedLocator([-100, -30, -10, -3, 0, *(c * 10**n for n in range(5) for c in (3, 10))])
    )
    right_axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    right_axis.axhspan(-3, 3, color="tab:green", alpha=0.12, linewidth=0, label="null ± 3 deviations")
    parts = [axis.get_legend_handles_labels() for axis in (left, right_axis)]
    entries = {label: handle for handles, labels in parts for handle, label in zip(handles, labels, strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def _point(axis: Axes, x: Mean, y: Mean, method: str, name: str, offset: int) -> None:
    """A method with its deviations; hollow without prototypes of its own. A beta-VAE's beta is ``offset`` points up."""
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
    """1, 2 and 5 of each decade, written out; more of them where the axis spans less than one."""
    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 5, 7)
    # Not LogLocator, which turns to linear ticks, one over the other, where it finds fewer than two.
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
    """MSE before and after each optimizer's step, of the last batches and of all of them, a line a method."""
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
    """``trace`` (batches, phases) in the order of time."""
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
    """Test MSE and r^2/D over the bandwidth of the paper's MMD, a point a seed."""
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
