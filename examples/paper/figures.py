"""All figures of a study with their captions: the paper's figures 2 to 6, and four of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.figure import Figure

from .charts import bandwidth, curves, frontier, limit_cycle, spreads
from .pictures import decoded, latent_maps, noise, reconstructions
from .results import NAMES, Run, Study, base, fitted

FOUR = ("balanced", "algorithm-1-paper", "kmeans")  # the methods that have a figure 4
FROM_ARRAYS = ("figure-2", "figure-3", "figure-5", "limit-cycle", *(f"figure-4-{method}" for method in FOUR))

Drawer = tuple[str, str, Callable[[], Figure | None]]  # name, caption, drawing


def draw_all(study: Study, runs: list[Run], results: Path) -> Iterator[tuple[str, str, Figure | None]]:
    """The name, caption and figure of every picture. The figure is None if these runs cannot show it."""
    paper = [run for run in runs if not fitted(run)]
    drawers: list[Drawer] = [
        (
            "spreads",
            "Control against recall, when each method samples from its best prior. Along a curve the spread of the "
            "draw grows: the covariance of each component is multiplied by the square of the spread. Mean over seeds.",
            lambda: spreads(runs),
        ),
        (
            "frontier",
            "Reconstruction, control and regularity of every method, K = 30, mean and deviation over seeds. "
            "Standardised MMD: how far held-out latents are from the normal distributions that samples are drawn from, "
            "in standard deviations of the null. Hollow: no prototypes of its own; samples are drawn around k-means "
            "centres, with the better of unit noise and the clusters' own spread.",
            lambda: frontier(paper),
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
    drawers += [_figure_4(method, runs, results) for method in FOUR]
    for name, caption, draw in drawers:
        figure = draw()
        if figure is not None:
            figure.suptitle(str(study), fontsize=9, color="0.4")
        yield name, caption, figure


def _figure_4(method: str, runs: list[Run], results: Path) -> Drawer:
    """Samples of the fitted clusters, or of N(v, I) if no run of the method has fitted them."""
    shaped = base(runs, f"{method}-clusters", 30)
    some = shaped or base(runs, method, 30)
    drawn_from = "of its cluster's normal distribution (`head.fit`)" if shaped else "of N(v, I) around each"
    caption = (
        f"{NAMES[method]}: decoded prototypes in red frames, and samples {drawn_from}. All K = 30 are shown, none is "
        "picked. The paper's figure 4 shows ten that were picked by hand."
    )
    return f"figure-4-{method}", caption, lambda: noise(some, results)
