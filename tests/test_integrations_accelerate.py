"""Prototypes in an accelerate loop: accumulation, half precision and exact resume."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from proto_reg import PrototypeWarning, PrototypicalRegularizer, Schedule, attach
from proto_reg.integrations.accelerate import log_metrics

ROOT = Path(__file__).resolve().parents[1]
DIM, K, BATCHES = 16, 10, 10


class AE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, DIM))
        self.decoder = nn.Sequential(nn.Linear(DIM, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Run:
    """A user's loop. Only two lines come from this library: ``attach`` and ``log_metrics``."""

    def __init__(self, folder: Path, mixed_precision: str = "no", **options) -> None:
        AcceleratorState._reset_state(True)  # allows another precision in the same process
        set_seed(0)
        self.accelerator = Accelerator(
            cpu=True,
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=2,
            project_config=ProjectConfiguration(str(folder), automatic_checkpoint_naming=False),
            **options,
        )
        model = AE()
        attach(model, "encoder", DIM, K, schedule=Schedule(warmup_steps=4))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        x = torch.from_numpy(load_digits().data[: 64 * BATCHES] / 16).float()
        loader = DataLoader(TensorDataset(x), batch_size=64, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.x, self.losses, self.metrics = x, [], []

    def epoch(self, start: int = 0, stop: int = BATCHES) -> None:
        loader = self.accelerator.skip_first_batches(self.loader, start) if start else self.loader
        for number, (x,) in enumerate(loader, start):
            if number == stop:
                return
            with self.accelerator.accumulate(self.model):
                loss = F.binary_cross_entropy_with_logits(self.model(x), x)
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.losses.append(loss.detach())
        self.metrics.append(log_metrics(self.accelerator, self.model, len(self.losses)))

    def layer(self) -> PrototypicalRegularizer:
        return self.accelerator.unwrap_model(self.model).prototypes


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accumulation_and_precision(tmp_path: Path, mixed_precision: str) -> None:
    run = Run(tmp_path, mixed_precision)
    for _ in range(4):
        run.epoch()
    assert run.losses[-1] < 0.7 * run.losses[0]
    assert run.layer().steps == 4 * BATCHES
    assert {t.dtype for t in run.layer().state_dict().values()} <= {torch.float32, torch.int64}
    # There are half as many optimizer steps as batches. The prototypes moved in these steps.
    (state,) = (run.optimizer.state[p] for p in run.layer().parameters())
    assert state["step"] == 4 * BATCHES / 2
    assert 1 < run.metrics[-1]["prototypes/perplexity"] <= K
    assert run.metrics[0] != run.metrics[1]
    with pytest.warns(PrototypeWarning, match="metrics: no latent was counted"):  # the counts began anew
        run.layer().metrics()


def test_state_saved_within_an_epoch_resumes_exactly(tmp_path: Path) -> None:
    whole = Run(tmp_path)
    whole.epoch()
    whole.epoch(stop=6)
    whole.accelerator.save_state(str(tmp_path / "state"))
    kept = torch.get_rng_state()
    whole.epoch(6)
    whole.epoch()
    resumed = Run(tmp_path)
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert resumed.layer().steps == BATCHES + 6
    assert torch.equal(torch.get_rng_state(), kept)
    resumed.epoch(6)
    resumed.epoch()
    assert resumed.losses == whole.losses[-2 * BATCHES + 6 :]
    assert resumed.metrics == whole.metrics[-2:]
    second = resumed.model.state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, second[key]), key


class Rows(GeneralTracker):
    """A tracker with accelerate's interface. It keeps all values that it gets."""

    name, requires_logging_directory = "rows", False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[dict, int]] = []

    @property
    def tracker(self) -> list[tuple[dict, int]]:
        return self.rows

    def store_init_configuration(self, values: dict) -> None:
        pass

    def log(self, values: dict, step: int, **options: object) -> None:
        self.rows.append((values, step))


def test_trackers_get_the_metrics(tmp_path: Path) -> None:
    rows = Rows()
    run = Run(tmp_path, log_with=rows)
    run.accelerator.init_trackers("digits")
    run.epoch()
    assert rows.rows == [(run.metrics[0], BATCHES)]
    assert set(run.metrics[0]) >= {"prototypes/perplexity", "prototypes/r2_per_dim", "prototypes/prototype_loss"}


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "accelerate_loop.py")
    command = [sys.executable, "-W", "ignore", script, "--epochs", "15", "--mixed-precision", "bf16"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split("test MSE ")[1].split(",")[0]) < 0.02
    assert float(result.stdout.split("purity ")[1].split(",")[0]) > 0.7
    assert "prototypes/perplexity" in result.stdout
