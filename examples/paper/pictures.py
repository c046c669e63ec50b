"""Figures of images and latents from the arrays of the runs: the paper's figures 2 to 5.

Each function returns a Figure, or None if no run has the arrays for it.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .results import CURVES, PLAIN, PROTOTYPICAL, SHORT, Run, arrays_of, base, mean_of, prototype_counts

SHOWN = (1, 2, 5, 10, 20, 30, 50)  # the paper's K


def mosaic(images: np.ndarray, columns: int, gap: int = 2, fill: int = 255) -> np.ndarray:
    """Bytes (n, C, H, W) as one picture with this many columns: (rows * H, columns * W), or with three colours last."""
    images = enlarged(images)
    n, channels, height, width = images.shape
    lines = -(-n // columns)
    picture = np.full((lines * (height + gap) - gap, columns * (width + gap) - gap, channels), fill, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        picture[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return picture[..., 0] if channels == 1 else picture


def enlarged(images: np.ndarray) -> np.ndarray:
    """Small images at a whole multiple of their size. Gaps and frames then fit all of them."""
    scale = max(1, 28 // images.shape[-1])
    return images.repeat(scale, -1).repeat(scale, -2)


def show(axis: Axes, picture: np.ndarray) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def decoded(runs: list[Run], results: Path, columns: int = 10) -> Figure | None:
    """Figure 2: a column for each method and a block for each K."""
    found = {}
    for method in PROTOTYPICAL:
        images = {K: arrays_of(base(runs, method, K), results) for K in prototype_counts(runs, method) if K in SHOWN}
        if len(images) > 1 and any(images.values()):  # with a single K the column would be blank
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
    """Add white images up to a full line. All mosaics then have the same width."""
    missing = -len(images) % columns
    return np.concatenate([images, np.full((missing, *images.shape[1:]), 255, np.uint8)])


def noise(runs: list[Run], results: Path, blocks: int = 3) -> Figure | None:
    """Figure 4 of one method: a line for each prototype, in blocks side by side."""
    arrays = arrays_of(runs, results)
    if arrays is None or "noise" not in arrays:  # this is the largest array, and kept results may lack it
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
    """Figure 3: the baselines are in the first column. Then there is a line for each method and a column for each K."""
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
    """Figure 5: the images are in the first line. Each model has a line below."""
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
