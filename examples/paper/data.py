"""The data sets by name, and the images for training and for judgement."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from examples.image_data import Images, load, load_digits

from .trained import ImageData

# The mean training pixel tells the data sets apart, because all IDX files have the same names.
MEAN_PIXEL = {"digits": 0.305, "mnist": 0.1307, "fashion": 0.2860, "cifar10": 0.4734, "cifar100": 0.4782}
NAMES = {
    "digits": "digits",
    "mnist": "MNIST",
    "fashion": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
}
FIRST_LABELS = {"cifar10": [6, 9, 9, 4, 1], "cifar100": [19, 29, 0, 11, 1]}  # in the published files
SPLITS = ("test", "validation")


def load_images(data: str, data_dir: Path | None) -> Images:
    """The data set ``data`` in ``data_dir``. Raises ValueError if the folder is missing or holds another data set."""
    if data == "digits":
        return load_digits()
    if data_dir is None:
        raise ValueError(f"--data-dir: expected the folder of {NAMES[data]}, got none. Name it.")
    images = load(data_dir)
    mean = images.train.mean().item()
    if abs(mean - MEAN_PIXEL[data]) > 0.002:
        raise ValueError(
            f"--data-dir: expected {NAMES[data]}, whose mean pixel is {MEAN_PIXEL[data]:.4f}, got {images.name} with "
            f"{mean:.4f} in {data_dir}. Name the folder that holds {NAMES[data]} alone."
        )
    name = NAMES[data]
    if data in FIRST_LABELS and images.train_labels[:5].tolist() != FIRST_LABELS[data]:
        name += " (JPEG copy)"
    return images._replace(name=name)


@lru_cache(maxsize=1)
def load_far(data_dir: Path, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
    """The name and the test images (M, C*H*W) of another data set, which lies in ``data_dir``.

    Raises ValueError if its images do not have this ``shape``, or if it is none of ours.
    """
    images = load(data_dir)
    mean = images.train.mean().item()
    names = [NAMES[name] for name, known in MEAN_PIXEL.items() if abs(mean - known) <= 0.002]
    if not names or images.shape != shape:
        raise ValueError(
            f"--far-dir: expected one of {sorted(NAMES.values())} with images of {shape}, got {images.shape} with a "
            f"mean pixel of {mean:.4f} in {data_dir}. Name another folder."
        )
    return names[0], images.test


def split(
    images: Images,
    on: str,
    train_images: int | None = None,
    test_images: int | None = None,
    validation_images: int = 10_000,
) -> ImageData:
    """The images that a run trains on, and those that judge it.

    ``on="validation"`` judges by the last ``validation_images`` of a fixed permutation of the training images. It
    trains on the others. ``on="test"`` judges by the test images and may train on all training images. Both take at
    most ``train_images`` and ``test_images``.
    """
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))
    if on == "validation":
        order, held_out = order[:-validation_images], order[-validation_images:]
        judged, judged_labels = images.train[held_out], images.train_labels[held_out]
    else:
        judged, judged_labels = images.test, images.test_labels
    train = order[:train_images]
    return ImageData(
        images.name,
        images.shape,
        images.train[train],
        images.train_labels[train],
        judged[:test_images],
        judged_labels[:test_images],
    )
