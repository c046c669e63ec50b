"""Images on a user's disk: scikit-learn's digits, IDX files (MNIST, Fashion-MNIST), ``cifar-10-batches-py`` and
``cifar-100-python``."""

from __future__ import annotations

import argparse
import gzip
import pickle
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Images(NamedTuple):
    """Flattened pixels in [0, 1]: train and test (N, C*H*W) with labels (N,). ``shape`` is (C, H, W)."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    shape: tuple[int, int, int]


def load(data_dir: Path | None = None) -> Images:
    """The data set in ``data_dir`` or below it, in torchvision's layout. For None, the 8x8 digits."""
    if data_dir is None:
        return load_digits()
    if not data_dir.is_dir():
        raise ValueError(f"--data-dir: expected an existing folder, got {data_dir}. Check the path.")
    if (found := sorted(data_dir.rglob("train-images-idx3-ubyte*"))) != []:
        return load_idx(found[0].parent)
    for folder in CIFAR:
        if (found := sorted(data_dir.rglob(folder))) != []:
            return load_cifar(found[0])
    raise ValueError(
        f"--data-dir: expected train-images-idx3-ubyte[.gz], {' or '.join(CIFAR)} in {data_dir} or below it, found "
        "neither. Name the folder that torchvision.datasets was given as root."
    )


def load_for(parser: argparse.ArgumentParser, data_dir: Path | None) -> Images:
    """:func:`load` for a program. A fault in the folder becomes a usage error of the program."""
    try:
        return load(data_dir)
    except ValueError as error:
        parser.error(str(error))


def load_digits() -> Images:
    """The 1,797 handwritten digits in scikit-learn. Every fifth one is a test image."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    pixels = torch.from_numpy(digits.data / 16).float()
    labels = torch.from_numpy(digits.target).long()
    held_out = torch.arange(len(labels)) % 5 == 0
    return Images("digits", pixels[~held_out], labels[~held_out], pixels[held_out], labels[held_out], (1, 8, 8))


def load_idx(folder: Path) -> Images:
    """Read MNIST's format, with or without gzip."""
    arrays = {
        key: torch.from_numpy(_read_idx(folder, f"{split}-{kind}-idx{rank}-ubyte"))
        for key, split, kind, rank in (
            ("train", "train", "images", 3),
            ("train_labels", "train", "labels", 1),
            ("test", "t10k", "images", 3),
            ("test_labels", "t10k", "labels", 1),
        )
    }
    height, width = arrays["train"].shape[1:]
    return Images(
        folder.parent.name if folder.name == "raw" else folder.name,
        arrays["train"].flatten(1) / 255,
        arrays["train_labels"].long(),
        arrays["test"].flatten(1) / 255,
        arrays["test_labels"].long(),
        (1, height, width),
    )


def _read_idx(folder: Path, name: str) -> np.ndarray:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise ValueError(f"--data-dir: expected {name} or {name}.gz in {folder}, found neither. Unpack all four files.")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


class _ArraysOnly(pickle.Unpickler):
    """CIFAR-10 comes as pickles. This class reads only NumPy arrays and plain containers from them."""

    ALLOWED = frozenset(
        {("_reconstruct", "multiarray"), ("ndarray", "numpy"), ("dtype", "numpy"), ("encode", "_codecs")}
    )

    def find_class(self, module: str, name: str):
        if (name, module.rsplit(".", 1)[-1]) not in self.ALLOWED or module.split(".")[0] not in {"numpy", "_codecs"}:
            raise pickle.UnpicklingError(f"{module}.{name} has no business in a CIFAR-10 batch")
        return super().find_class(module, name)


# For each folder: the name, the training files, the test file and the key of the labels.
CIFAR = {
    "cifar-10-batches-py": ("CIFAR-10", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels"),
    "cifar-100-python": ("CIFAR-100", ["train"], "test", b"fine_labels"),
}


def load_cifar(folder: Path) -> Images:
    """The python version of CIFAR-10, or of CIFAR-100 with its 100 fine labels."""
    name, training, test, key = CIFAR[folder.name]

    def read(file_name: str) -> tuple[Tensor, Tensor]:
        with (folder / file_name).open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        return torch.from_numpy(batch[b"data"]), torch.tensor(batch[key])

    pixels, labels = zip(*map(read, training), strict=True)
    test_pixels, test_labels = read(test)
    return Images(name, torch.cat(pixels) / 255, torch.cat(labels), test_pixels / 255, test_labels, (3, 32, 32))
