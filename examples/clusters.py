"""Prototypes as clusters: how many, which belong together, and their nearest examples.

python -m examples.clusters                                        # scikit-learn's digits, a minute on a CPU core
python -m examples.clusters --data mnist --data-dir DIR            # or fashion; ten minutes

It trains the network of the comparison (examples/paper, with its requirements) with several numbers of prototypes K,
as the comparison does for tuning: on MNIST and Fashion-MNIST with 50,000 of the training images. It merges the
prototypes to as many groups as the data have classes. It prints ACC and NMI on test images. "Fitted" gives an image to
its most probable prototype after ``head.fit``; the other rows go by the highest score. It draws clusters-counts.png,
clusters-hierarchy.png and clusters-nearest.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from examples.paper.config import load_config
from examples.paper.data import load_images, split
from examples.paper.session import new_method, runs_of
from examples.paper.train import train_epoch, trained_run
from examples.paper.trained import ImageData, TrainedRun
from proto_reg import functional, plots

CONFIGS = {"digits": "digits", "mnist": "mnist-small", "fashion": "fashion-small"}
COUNTS, DRAWN = (10, 30, 50), 30  # K of the rows, and of the pictures


def trained(name: str, label: str, data: ImageData, seed: int) -> TrainedRun:
    """The run ``label`` of the comparison's config ``name``."""
    config = load_config(name)
    run = next(r for r in runs_of(config, "validation", seeds=seed + 1, only=[label]) if r.seed == seed)
    method = new_method(run, data, torch.device("cpu"))
    method.add_optimizers()
    for epoch in range(config.epochs):
        train_epoch(method, data, config.batch_size, epoch)
    return trained_run(run.spec.method, method, data)


def agreement(labels: Tensor, found: Tensor) -> str:
    """ACC (best one-to-one matching of groups to classes) and NMI."""
    table = contingency_matrix(labels.numpy(), found.numpy())
    rows, columns = linear_sum_assignment(table, maximize=True)
    acc = table[rows, columns].sum() / table.sum()
    return f"{acc:.3f}  {normalized_mutual_info_score(labels.numpy(), found.numpy()):.3f}"


def show(name: str, figures: str) -> None:
    print(f"{name:<30}{figures}", flush=True)


def draw(model: TrainedRun, z: Tensor, tree: np.ndarray, groups: int, out: Path) -> None:
    """The three pictures. ``z`` (N, D) are the training latents."""
    data, head = model.data, model.head
    counts = functional.choose_num_prototypes(z[:20_000])
    plots.num_prototypes(counts).savefig(out / "clusters-counts.png", dpi=90)
    print(f"K by silhouette {counts.by_silhouette}, by likelihood {counts.by_likelihood}")
    figure = plots.hierarchy(model.decode, head, tree, num_groups=groups, image_shape=data.shape)
    figure.savefig(out / "clusters-hierarchy.png", dpi=80)
    examples = functional.nearest_examples(head, z, 7)
    figure = plots.nearest_examples(model.decode, head, data.train_images, examples, image_shape=data.shape, blocks=3)
    figure.savefig(out / "clusters-nearest.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=CONFIGS, default="digits")
    parser.add_argument("--data-dir", type=Path, help="folder of the IDX files; none for the digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        images = load_images(args.data, args.data_dir)
    except ValueError as error:
        parser.error(str(error))
    data = split(images, "validation", validation_images=load_config(CONFIGS[args.data]).validation_images)
    torch.set_num_threads(1)
    classes = len(data.train_labels.unique())
    print(f"{data.name}, {len(images.test)} test images, seed {args.seed}: ACC, NMI")
    plain = trained(CONFIGS[args.data], "autoencoder", data, args.seed)
    clusters = KMeans(classes, n_init=5, random_state=args.seed).fit(plain.encode(data.train_images)[:20_000].numpy())
    found = torch.from_numpy(clusters.predict(plain.encode(images.test).numpy()))
    show(f"autoencoder + k-means, K = {classes}", agreement(images.test_labels, found))
    for count in COUNTS:
        model = trained(CONFIGS[args.data], f"ours, K = {count}", data, args.seed)
        z, found = model.encode(data.train_images), model.head(model.encode(images.test)).argmax(1)
        show(f"K = {count}", agreement(images.test_labels, found))
        model.head.fit(z)
        found = model.head.mixture().responsibilities(model.encode(images.test)).argmax(1)
        show(f"K = {count}, fitted", agreement(images.test_labels, found))
        if count <= classes:
            continue
        tree = functional.prototype_hierarchy(model.head)
        groups = torch.from_numpy(cut_tree(tree, classes)[:, 0])
        show(f"K = {count}, fitted, merged to {classes}", agreement(images.test_labels, groups[found]))
        if count == DRAWN:
            draw(model, z, tree, classes, args.out)


if __name__ == "__main__":
    main()
