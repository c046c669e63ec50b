"""The examples in a short form, on real digits, and the readers of common image files."""

from __future__ import annotations

import gzip
import importlib
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
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


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Run a script in this process as its command line does. This process has imported torch already."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(script: str, *arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(script.removesuffix(".py")).main()

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The quickstart, as a new user runs it: the folder with its files, and its output."""
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, run("quickstart.py", cwd=folder)


def rows_of(table: str) -> dict[str, list[str]]:
    return {line[:16].strip(): line[16:].split() for line in table.splitlines() if line.startswith(("auto", "with"))}


@pytest.mark.slow
def test_quickstart_reaches_what_it_promises(quickstart: tuple[Path, str]) -> None:
    folder, table = quickstart
    rows = rows_of(table)
    mse = {name: float(cells[0]) for name, cells in rows.items()}
    _, _, purity, _, control, radius, _ = (float(cell) for cell in rows["with prototypes"])
    assert mse["with prototypes"] <= 1.05 * mse["autoencoder"]
    assert purity > 0.8
    assert control > 0.85
    assert 0.7 < radius < 1.3
    assert (folder / "quickstart.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_checkpoint_of_the_quickstart_makes_images(quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    run("sample.py", "3", "7", "--num-samples", "4", cwd=folder)
    assert (folder / "samples.png").exists()


@pytest.mark.slow
@pytest.mark.warm_up
@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
def test_quickstart_is_deterministic(here: Callable[..., None], tmp_path: Path) -> None:
    """One run is in a new process, and the other one is in this process."""
    arguments = ("--epochs", "2", "--seed", "5", "--out")
    run("quickstart.py", *arguments, tmp_path / "a", cwd=tmp_path)
    here("quickstart.py", *arguments, tmp_path / "b")
    first, second = (torch.load(tmp_path / name / "quickstart.pt", weights_only=True)["model"] for name in "ab")
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.slow
@pytest.mark.warm_up
@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")  # the warm-up takes the whole epoch
def test_ablations_run(here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    ablations = importlib.import_module("ablations")
    judges: list[torch.nn.Module] = []

    def judge(*arguments) -> torch.nn.Module:
        """The judge of the first study. Every study trains the same judge."""
        if not judges:
            judges.append(train_judge(*arguments))
        return judges[0]

    train_judge = ablations.train_judge
    monkeypatch.setattr(ablations, "train_judge", judge)
    torch.set_num_threads(1)  # a second thread does not speed up such small batches
    for what, names in (("prototypes", 8), ("kl", 7), ("queue", 4), ("shares", 4)):
        here("ablations.py", what, "--epochs", "1", "--seeds", "1")
        out = capsys.readouterr().out
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
