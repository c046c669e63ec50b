"""Pictures of the latent space (extra ``plots``: matplotlib and scikit-learn)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import check_choice, check_floating, check_head, check_matrix, check_positive_int
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
    std: float | None = None,
    image_shape: tuple[int, int, int] | None = None,
    indices: list[int] | None = None,
    blocks: int = 1,
    generator: torch.Generator | None = None,
) -> Figure:
    """Each row: a decoded prototype and, right of it, decoded samples around it, as :meth:`PrototypeHead.sample` draws.

    Args:
        decode: latents (n, D) -> images (n, C, H, W) in [0, 1], or (n, C*H*W) with ``image_shape`` (C, H, W).
        std: standard deviation of the samples. None takes the head's, or the shapes of :meth:`PrototypeHead.fit`.
        indices: which prototypes, all by default.
        blocks: number of columns, so that many prototypes fit on one screen.

    Raises:
        TypeError, ValueError: an argument is out of its range, or ``decode`` returns no images.
    """
    check_head(head)
    check_positive_int("num_samples", num_samples, minimum=0)
    check_positive_int("blocks", blocks)
    chosen = [head.check_index(k) for k in (range(head.num_prototypes) if indices is None else indices)]
    if not chosen:
        raise ValueError("indices: expected at least one prototype, got none. Leave it out to draw all.")
    height, width = -(-len(chosen) // blocks), num_samples + 1
    figure = Figure(figsize=(0.7 * (width + 0.2) * blocks, 0.7 * height + 0.3), layout="constrained")
    rows = [
        axes
        for part in figure.subfigures(1, blocks, squeeze=False)[0]
        for axes in part.subplots(height, width, squeeze=False)
    ]
    for axes in rows[len(chosen) :]:
        for axis in axes:
            axis.set_axis_off()
    for k, axes in zip(chosen, rows, strict=False):  # the last block may be shorter
        around = head.sample(num_samples, k, std=std, generator=generator) if num_samples else head.prototypes[:0]
        images = _images(decode(torch.cat([head.prototypes[k : k + 1], around])), image_shape)
        for axis, image in zip(axes, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0].set_ylabel(f"{k}", rotation=0, ha="right", va="center")
        for spine in axes[0].spines.values():
            spine.set(color="tab:red", linewidth=2)
    for axes in rows[::height]:
        axes[0].set_title("v", fontsize=9)
        if num_samples:
            axes[1 + (num_samples - 1) // 2].set_title(_name(head, std), fontsize=9)
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


def _name(head: PrototypeHead, std: float | None) -> str:
    """The distribution around a prototype v."""
    if std is None and head.shapes is not None:
        return "N(c, S)"
    std = head.std if std is None else std
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


def _images(decoded: Tensor, shape: tuple[int, int, int] | None) -> np.ndarray:
    """(n, H, W) or (n, H, W, 3) for matplotlib."""
    if shape is not None and decoded[0].numel() != math.prod(shape):
        raise ValueError(
            f"image_shape: expected (C, H, W) of {decoded[0].numel()} numbers, which decode returns for a latent, got "
            f"{shape}. Pass the shape of your images."
        )
    images = decoded if shape is None else decoded.reshape(-1, *shape)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"decode: expected images (n, 1 or 3, H, W), got shape {tuple(decoded.shape)}. Pass image_shape=(C, H, W) "
            "for flat outputs."
        )
    images = images.float().clamp(0, 1).cpu()
    return (images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)).numpy()
