"""The examples, in a short form, on real digits; and the readers of the files people have."""

from __future__ import annotations

import gzip
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(script: str, *arguments: str | Path, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows_of(table: str) -> dict[str, list[str]]:
    return {line[:16].strip(): line[16:].split() for line in table.splitlines() if line.startswith(("auto", "with"))}


def test_quickstart_reaches_what_it_promises_and_its_checkpoint_makes_images(tmp_path: Path) -> None:
    table = run("quickstart.py", cwd=tmp_path)
    rows = rows_of(table)
    mse = {name: float(cells[0]) for name, cells in rows.items()}
    _, _, purity, _, control, radius, _ = (float(cell) for cell in rows["with prototypes"])
    assert mse["with prototypes"] <= 1.05 * mse["autoencoder"]
    assert purity > 0.8
    assert control > 0.85
    assert 0.7 < radius < 1.3
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    run("sample.py", "3", "7", "--num-samples", "4", cwd=tmp_path)
    assert (tmp_path / "samples.png").exists()


def test_quickstart_is_deterministic(tmp_path: Path) -> None:
    checkpoints = []
    for name in ("a", "b"):
        run("quickstart.py", "--epochs", "2", "--seed", "5", "--out", tmp_path / name, cwd=tmp_path)
        checkpoints.append(torch.load(tmp_path / name / "quickstart.pt", weights_only=True)["model"])
    for key, value in checkpoints[0].items():
        assert torch.equal(value, checkpoints[1][key]), key


def test_ablations_run(tmp_path: Path) -> None:
    for what, names in (("prototypes", 8), ("kl", 7), ("queue", 6), ("shares", 4)):
        out = run("ablations.py", what, "--epochs", "1", "--seeds", "1", cwd=tmp_path)
        assert len(out.split("mean of 1 seeds")[1].strip().splitlines()) == names + 1


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def image_data(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import image_data

    return image_data


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_where_torchvision_leaves_them(image_data, tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {split: rng.integers(0, 256, (count, 28, 28), np.uint8) for split, count in (("train", 6), ("t10k", 4))}
    for split, array in images.items():
        write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", array)
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", np.arange(len(array), dtype=np.uint8))
    data = image_data.load(tmp_path)
    assert (data.name, data.shape) == ("FashionMNIST", (1, 28, 28))
    assert torch.equal(data.train, torch.from_numpy(images["train"]).flatten(1) / 255)
    assert data.test_labels.tolist() == [0, 1, 2, 3]


def test_cifar10_as_torchvision_leaves_it(image_data, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [3, 1, 2]}, protocol=2))
    data = image_data.load(tmp_path)
    assert data.train.shape == (15, 3072)
    assert torch.equal(data.test, torch.from_numpy(pixels) / 255)
    assert data.shape == (3, 32, 32)


def test_a_pickle_that_wants_more_than_arrays_is_refused(image_data, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": subprocess.Popen}, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="no business"):
        image_data.load(tmp_path)


def test_missing_data_is_explained(image_data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected an existing folder"):
        image_data.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found neither"):
        image_data.load(tmp_path)
