"""Prototypes under an unmodified transformers.Trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from proto_reg import PrototypeWarning, PrototypicalRegularizer, Schedule, attach
from proto_reg.integrations.transformers import PrototypeTrainerCallback

ROOT = Path(__file__).resolve().parents[1]
DIM, K, EPOCHS, BATCHES = 16, 10, 4, 10


class AE(nn.Module):
    """A user's model. It returns its loss, as the Trainer requires."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, DIM))
        self.decoder = nn.Sequential(nn.Linear(DIM, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        logits = self.decoder(self.encoder(pixel_values))
        return {"loss": F.binary_cross_entropy_with_logits(logits, pixel_values), "logits": logits}


def digits() -> Tensor:
    return torch.from_numpy(load_digits().data[: 64 * BATCHES] / 16).float()


def trainer(folder: Path, model: nn.Module | None = None, model_init: Any = None, **options: Any) -> Trainer:
    choices: dict[str, Any] = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 64,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "epoch",
    }
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **choices | options)
    return Trainer(model, arguments, train_dataset=[{"pixel_values": x} for x in digits()], model_init=model_init)


def add(run: Trainer, **options: Any) -> None:
    run.add_callback(PrototypeTrainerCallback(run, "encoder", latent_dim=DIM, num_prototypes=K, **options))


@pytest.mark.parametrize("bf16", [False, True])
def test_training_with_accumulation(tmp_path: Path, bf16: bool) -> None:
    model, heard = AE(), []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict, **others: Any) -> None:
            heard.append(dict(logs))

    run = trainer(tmp_path, model, gradient_accumulation_steps=2, bf16=bf16)
    run.add_callback(Reporter())  # before our callback, where the Trainer also adds TensorBoard and W&B
    add(run)
    result = run.train()
    assert result.global_step == EPOCHS * BATCHES / 2
    assert model.prototypes.steps == EPOCHS * BATCHES
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    rows = [row for row in run.state.log_history if "prototypes/perplexity" in row]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all(1 <= row["prototypes/perplexity"] <= K for row in rows)
    assert len([logs for logs in heard if "prototypes/perplexity" in logs]) == EPOCHS
    assert {t.dtype for t in model.prototypes.state_dict().values()} <= {torch.float32, torch.int64}
    (state,) = (run.optimizer.state[p] for p in model.prototypes.parameters())
    assert state["step"] == result.global_step
    # The Trainer's default optimizer is a fused one. Prototypes follow their latents with it, too.
    assert "fused" in run.args.optim
    assert model.prototypes.follower.weight_sums.sum() <= 2 * 64


@pytest.mark.parametrize("save_steps", [10, 7])
def test_resume_from_checkpoint_ends_with_the_same_numbers(tmp_path: Path, save_steps: int) -> None:
    """The checkpoint is at the end of an epoch or inside one. An epoch has five optimizer steps."""
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": save_steps}
    runs = []
    for resume in (None, str(tmp_path / f"checkpoint-{save_steps}")):
        torch.manual_seed(3)
        runs.append(trainer(tmp_path, AE(), **options))
        add(runs[-1], schedule=Schedule(warmup_steps=5))
        runs[-1].train(resume_from_checkpoint=resume)
    whole, resumed = runs
    second = resumed.model.state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, second[key]), key
    both = [[row for row in run.state.log_history if "prototypes/perplexity" in row] for run in runs]
    assert [row["epoch"] for row in both[0]] == [1, 2, 3, 4]
    # At the end of an epoch the Trainer saves first and logs afterwards.
    # So only the first run's history has the row of that epoch.
    assert both[1] == [row for row in both[0] if row["epoch"] != save_steps / 5]


def test_a_layer_of_the_model_itself(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = AE()
        attach(model, "encoder", DIM, K)
        return model

    for choice in ({"model": build()}, {"model_init": build}):
        run = trainer(tmp_path, num_train_epochs=1, **choice)
        run.add_callback(PrototypeTrainerCallback(run))
        run.train()
        assert run.model.prototypes.steps == BATCHES
        assert any("prototypes/perplexity" in row for row in run.state.log_history)


def test_a_warm_up_as_long_as_the_training_is_warned_of(tmp_path: Path) -> None:
    run = trainer(tmp_path, AE(), num_train_epochs=1)
    add(run, schedule=Schedule(warmup_steps=BATCHES))
    with pytest.warns(PrototypeWarning, match="warmup_steps = 10 covers all 10 steps of the training"):
        run.train()


def test_errors_name_the_cure(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="trainer: expected a Trainer, got str"):
        PrototypeTrainerCallback("encoder")
    with pytest.raises(ValueError, match="encode: expected the name of a submodule, or a model with a layer"):
        PrototypeTrainerCallback(trainer(tmp_path, AE()))
    with pytest.raises(ValueError, match="got model_init, which builds another one"):
        add(trainer(tmp_path, model_init=AE))
    trained = trainer(tmp_path, AE(), max_steps=1)
    trained.create_optimizer()
    with pytest.raises(ValueError, match=r"one without an optimizer yet, got one with. Call proto_reg.attach before"):
        add(trained)
    with pytest.raises(
        ValueError, match="mode: expected 'balanced', got 'weighted': a callback cannot add to your loss"
    ):
        add(trainer(tmp_path, AE()), mode="weighted")
    assert not any(isinstance(module, PrototypicalRegularizer) for module in trained.model.modules())


def test_a_missing_framework_is_named_with_its_extra() -> None:
    code = "import sys; sys.modules['transformers'] = None; import proto_reg.integrations.transformers"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "pip install 'proto_reg[transformers]'" in result.stderr


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "transformers_trainer.py")
    command = [sys.executable, "-W", "ignore", script, "--epochs", "15", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split("test MSE ")[1].split(",")[0]) < 0.02
    assert float(result.stdout.split("purity ")[1].split(",")[0]) > 0.7
    assert "prototypes/perplexity" in result.stdout
