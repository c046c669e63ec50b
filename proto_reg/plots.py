"""Pictures of the latent space (extra ``plots``: matplotlib and scikit-learn)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import check_choice, check_floating, check_head, check_matrix, check_positive_int
from .functional import PrototypeCounts
from .head import PrototypeHead

try:
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("proto_reg.plots needs matplotlib. Run: pip install 'proto_reg[plots]'") from error

if TYPE_CHECKING:
    import numpy as np

MAPS = ("tsne", "pca")


@torch.no_grad()
def prototypes(
    decode: Callable[[Tensor], Tensor],
    head: PrototypeHead,
    *,
    num_samples: int = 9,
    spread: float = 1.0,
    image_shape: tuple[int, int, int] | None = None,
    indices: list[int] | None = None,
    blocks: int = 1,
    generator: torch.Generator | None = None,
) -> Figure:
    """Each row: a decoded prototype and, right of it, decoded samples around it, as :meth:`PrototypeHead.sample` draws.

    Args:
        decode: latents (n, D) -> images (n, C, H, W) in [0, 1], or (n, C*H*W) with ``image_shape`` (C, H, W).
        spread: of the samples, as in :meth:`PrototypeHead.sample`: .7 draws more typical ones.
        indices: which prototypes, all by default.
        blocks: number of columns, so that many prototypes fit on one screen.

    Raises:
        TypeError, ValueError: an argument is out of its range, or ``decode`` returns no images.
    """
    check_head(head)
    check_positive_int("num_samples", num_samples, minimum=0)
    check_positive_int("blocks", blocks)
    chosen = _chosen(head, indices)
    figure, rows = _grid(len(chosen), num_samples + 1, blocks)
    for k, axes in zip(chosen, rows, strict=True):
        around = head.sample(num_samples, k, spread=spread, generator=generator) if num_samples else head.prototypes[:0]
        _draw_row(axes, k, _images(decode(torch.cat([head.prototypes[k : k + 1], around])), image_shape))
    _title(rows, blocks, _name(head, spread))
    return figure


@torch.no_grad()
def nearest_examples(
    decode: Callable[[Tensor], Tensor],
    head: PrototypeHead,
    images: Tensor,
    examples: Tensor,
    *,
    image_shape: tuple[int, int, int] | None = None,
    indices: list[int] | None = None,
    blocks: int = 1,
) -> Figure:
    """Each row: a decoded prototype and, right of it, the images nearest to it. A place without an image stays empty.

    Args:
        decode: as in :func:`proto_reg.plots.prototypes`.
        images: (N, C, H, W) in [0, 1], or (N, C*H*W) with ``image_shape`` (C, H, W).
        examples: (K, n) int64 indices of images, as :func:`proto_reg.functional.nearest_examples` returns them.
        indices: which prototypes, all by default.
        blocks: number of columns, so that many prototypes fit on one screen.

    Raises:
        TypeError, ValueError: an argument is out of its range, or ``decode`` returns no images.
    """
    check_head(head)
    check_positive_int("blocks", blocks)
    chosen = _chosen(head, indices)
    examples = examples.cpu()
    if examples.ndim != 2 or len(examples) != head.num_prototypes or int(examples.max()) >= len(images):
        raise ValueError(
            f"examples: expected indices ({head.num_prototypes}, n) below {len(images)}, the number of images, got "
            f"shape {tuple(examples.shape)}. Pass nearest_examples(head, latents, n) of the same head and images."
        )
    figure, rows = _grid(len(chosen), examples.shape[1] + 1, blocks)
    for k, axes in zip(chosen, rows, strict=True):
        own = images[examples[k][examples[k] >= 0].to(images.device)]
        shown = [_images(decode(head.prototypes[k : k + 1]), image_shape)]
        shown += [_images(own, image_shape, "images")] if len(own) else []
        _draw_row(axes, k, [image for part in shown for image in part])
    _title(rows, blocks, "nearest examples")
    return figure


@torch.no_grad()
def hierarchy(
    decode: Callable[[Tensor], Tensor],
    head: PrototypeHead,
    tree: np.ndarray,
    *,
    num_groups: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> Figure:
    """The dendrogram of the prototypes. Its leaves are the decoded prototypes.

    Args:
        decode: as in :func:`proto_reg.plots.prototypes`.
        tree: linkage matrix (K - 1, 4), as :func:`proto_reg.functional.prototype_hierarchy` returns it.
        num_groups: gives each of so many groups a colour, and draws a line where the tree is cut. None: one colour.

    Raises:
        TypeError, ValueError: an argument is out of its range, or ``decode`` returns no images.
        ImportError: without SciPy.
    """
    check_head(head)
    count = head.num_prototypes
    if tree.shape != (count - 1, 4):
        raise ValueError(f"tree: expected shape {(count - 1, 4)}, got {tree.shape}. Pass prototype_hierarchy(head).")
    heights = [0.0, *tree[:, 2].tolist(), 1.1 * float(tree[-1, 2])]
    if num_groups is not None and not check_positive_int("num_groups", num_groups) <= count:
        raise ValueError(f"num_groups: expected at most {count} prototypes, got {num_groups}. Ask for fewer.")
    cut = 0.0 if num_groups is None else sum(heights[count - num_groups : count - num_groups + 2]) / 2
    figure = Figure(figsize=(max(4.0, 0.42 * count), 4), layout="constrained")
    grid = figure.add_gridspec(2, count, height_ratios=(6, 1), wspace=0.02, hspace=0)
    axis = figure.add_subplot(grid[0, :])
    leaves = _dendrogram(tree, axis, cut)
    if num_groups is not None:
        axis.axhline(cut, color="black", linewidth=0.8, linestyle="--", label=f"cut to {num_groups} groups")
        axis.legend(loc="upper right")
    axis.set(xticks=[], ylabel="mean Bhattacharyya distance")
    for spine in ("top", "right", "bottom"):
        axis.spines[spine].set_visible(False)
    for place, (k, image) in enumerate(zip(leaves, _images(decode(head.prototypes[leaves]), image_shape), strict=True)):
        leaf = figure.add_subplot(grid[1, place])
        _draw(leaf, image)
        leaf.set_xlabel(f"{k}", fontsize=8)
    return figure


def num_prototypes(counts: PrototypeCounts) -> Figure:
    """The two figures of :func:`proto_reg.functional.choose_num_prototypes`, over the number of prototypes K."""
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    tried, error = counts.candidates.tolist(), counts.standard_error
    above.errorbar(tried, counts.log_likelihood.tolist(), yerr=error.tolist(), marker=".", capsize=2)
    top = counts.log_likelihood.max().item()
    above.axhline(top, color="gray", linewidth=0.8, linestyle="--", label="highest; bars: one standard error to it")
    below.plot(tried, counts.silhouette.tolist(), marker=".")
    for axis, best, values, name in (
        (above, counts.by_likelihood, counts.log_likelihood, "log-likelihood"),
        (below, counts.by_silhouette, counts.silhouette, "silhouette"),
    ):
        ring = {"marker": "o", "markersize": 10, "color": "tab:red", "fillstyle": "none", "linestyle": "none"}
        axis.plot([best], [values[tried.index(best)].item()], label=f"K = {best}", **ring)
        axis.set(ylabel=f"{name} of\nheld-out latents", xscale="log")
        axis.legend(loc="lower right" if axis is above else "best", fontsize=8)
    below.set_xlabel("number of prototypes K")
    below.set_xticks(tried, labels=[f"{k}" for k in tried])
    below.minorticks_off()
    return figure


def usage(shares: Tensor) -> Figure:
    """Bar chart of the share of latents at each prototype (K,), as in ``latent_metrics(...)["usage"]``.

    Raises:
        TypeError, ValueError: no vector of shares.
    """
    check_floating("shares", shares)
    if shares.ndim != 1 or len(shares) == 0:
        raise ValueError(f"shares: expected shape (K,), got {tuple(shares.shape)}. Pass latent_metrics(...)['usage'].")
    figure = Figure(figsize=(max(4.0, 0.22 * len(shares)), 2.6), layout="constrained")
    axis = figure.subplots()
    axis.bar(range(len(shares)), shares.tolist())
    axis.axhline(1 / len(shares), color="tab:red", linewidth=1, label="even share")
    axis.set(xlabel="prototype", ylabel="share of latents")
    axis.legend()
    return figure


@torch.no_grad()
def latent_map(z: Tensor, head: PrototypeHead, labels: Tensor | None = None, *, method: str = "tsne") -> Figure:
    """Latents ``z`` (N, D) and prototypes in the plane, coloured by ``labels`` (N,) or by assignment.

    Args:
        method: ``"tsne"`` or ``"pca"``, from scikit-learn.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
        ImportError: without scikit-learn.
    """
    check_head(head)
    check_matrix("z", z, head.latent_dim, axes="(N, D)")
    check_choice("method", method, MAPS)
    if labels is not None and labels.shape != z.shape[:1]:
        raise ValueError(
            f"labels: expected shape {tuple(z.shape[:1])}, one for each latent, got {tuple(labels.shape)}. "
            "Pass the labels of the same examples."
        )
    if labels is None:
        colour, names = head(z).argmax(1), list(range(head.num_prototypes))
    else:
        values, colour = labels.unique(return_inverse=True)
        names = values.tolist()
    points = torch.cat([z, head.prototypes.to(z)]).float().cpu().numpy()
    plane = _project(points, method)
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axis = figure.subplots()
    latents, stars = plane[: len(z)], plane[len(z) :]
    scatter = axis.scatter(latents[:, 0], latents[:, 1], c=colour.cpu(), s=6, **_one_colour_each(len(names)))
    axis.scatter(stars[:, 0], stars[:, 1], marker="*", s=110, color="black", edgecolor="white", label="prototypes")
    axis.set(xticks=[], yticks=[], title=f"latents, {'t-SNE' if method == 'tsne' else 'PCA'}")
    axis.legend(loc="upper right")
    bar = figure.colorbar(scatter, label="prototype" if labels is None else "label")
    shown = range(0, len(names), -(-len(names) // 15))
    bar.set_ticks(list(shown), labels=[f"{names[i]}" for i in shown])
    return figure


def _chosen(head: PrototypeHead, indices: list[int] | None) -> list[int]:
    """The prototypes to draw. ValueError for none, or for one that the head does not have."""
    chosen = [head.check_index(k) for k in (range(head.num_prototypes) if indices is None else indices)]
    if not chosen:
        raise ValueError("indices: expected at least one prototype, got none. Leave it out to draw all.")
    return chosen


def _grid(count: int, width: int, blocks: int) -> tuple[Figure, list[Any]]:
    """A figure, and ``count`` rows of ``width`` axes in ``blocks`` columns of rows."""
    height = -(-count // blocks)
    figure = Figure(figsize=(0.7 * (width + 0.2) * blocks, 0.7 * height + 0.3), layout="constrained")
    rows = [
        axes
        for part in figure.subfigures(1, blocks, squeeze=False)[0]
        for axes in part.subplots(height, width, squeeze=False)
    ]
    for axes in rows[count:]:  # the last block may be shorter
        for axis in axes:
            axis.set_axis_off()
    return figure, rows[:count]


def _draw_row(axes: Any, k: int, images: Iterable[Any]) -> None:
    """Images from left to right. The first is that of prototype ``k``, in a red frame."""
    for axis, image in itertools.zip_longest(axes, images):
        if image is None:
            axis.set_axis_off()
        else:
            _draw(axis, image)
    axes[0].set_ylabel(f"{k}", rotation=0, ha="right", va="center")
    for spine in axes[0].spines.values():
        spine.set(color="tab:red", linewidth=2)


def _draw(axis: Any, image: Any) -> None:
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])


def _title(rows: list[Any], blocks: int, name: str) -> None:
    """Titles above each block: v above the prototypes, and ``name`` above the others."""
    for axes in rows[:: -(-len(rows) // blocks)]:
        axes[0].set_title("v", fontsize=9)
        if len(axes) > 1:
            axes[len(axes) // 2].set_title(name, fontsize=9)


def _dendrogram(tree: np.ndarray, axis: Any, cut: float) -> list[int]:
    """Draw ``tree``: one colour for each group below ``cut``. Return the leaves from left to right."""
    try:
        from scipy.cluster.hierarchy import dendrogram
    except ImportError as error:
        raise ImportError("hierarchy needs SciPy. Run: pip install 'proto_reg[plots]'") from error
    colour = "black" if cut else "tab:blue"
    return dendrogram(tree, ax=axis, no_labels=True, color_threshold=cut, above_threshold_color=colour)["leaves"]


def _name(head: PrototypeHead, spread: float) -> str:
    """The distribution that samples are drawn from."""
    if head.shapes is not None:
        return "N(c, S)" if spread == 1 else f"N(c, {spread:g}² S)"
    std = head.std * spread
    return "N(v, I)" if std == 1 else f"N(v, {std:g}² I)"


def _one_colour_each(count: int) -> dict[str, Any]:
    """Arguments of ``scatter`` for values 0 to ``count`` - 1: each has a colour and a field of the colour bar."""
    if count > 20:  # a circle of hues
        colours = matplotlib.colormaps["hsv"].resampled(count)
    else:
        colours = ListedColormap(matplotlib.colormaps["tab10" if count <= 10 else "tab20"](range(count)))
    return {"cmap": colours, "vmin": -0.5, "vmax": count - 0.5}


def _project(points: np.ndarray, method: str) -> np.ndarray:
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("latent_map needs scikit-learn. Run: pip install 'proto_reg[plots]'") from error
    if method == "pca":
        return PCA(2).fit_transform(points)
    return TSNE(perplexity=min(30.0, (len(points) - 1) / 3), random_state=0).fit_transform(points)


def _images(decoded: Tensor, shape: tuple[int, int, int] | None, name: str = "decode") -> np.ndarray:
    """(n, H, W) or (n, H, W, 3) for matplotlib. ``name``: the argument that ``decoded`` came from."""
    if shape is not None and decoded[0].numel() != math.prod(shape):
        raise ValueError(
            f"image_shape: expected (C, H, W) of {decoded[0].numel()} numbers, which decode returns for a latent, got "
            f"{shape}. Pass the shape of your images."
        )
    images = decoded if shape is None else decoded.reshape(-1, *shape)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{name}: expected images (n, 1 or 3, H, W), got shape {tuple(decoded.shape)}. Pass image_shape=(C, H, W) "
            "for flat outputs."
        )
    images = images.float().clamp(0, 1).cpu()
    return (images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)).numpy()
