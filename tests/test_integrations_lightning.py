"""Prototypes under Lightning. The user's module, loop and flags do not change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from proto_reg import PrototypeWarning, PrototypicalRegularizer, Schedule, attach
from proto_reg.integrations.lightning import PrototypeCallback, PrototypicalModuleMixin

ROOT = Path(__file__).resolve().parents[1]
DIM, K, EPOCHS = 16, 10, 4
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}:Warning:lightning.*")
    for text in (
        "The number of training batches",
        "The '.*' does not have many workers",
        "Checkpoint directory .* exists and is not empty",
    )
] + [pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")]


class AE(L.LightningModule):
    """A user's module, without anything of this library. Its decoder has batch norm and no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, DIM))
        self.decoder = nn.Sequential(nn.Linear(DIM, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 64))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).sigmoid()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.reconstruction(batch[0])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.reconstruction(batch[0]))

    def reconstruction(self, x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.decoder(self.encoder(x)), x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Paper(PrototypicalModuleMixin, L.LightningModule):
    """Algorithm 1 on the same networks."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        parts = AE()
        layer = PrototypicalRegularizer.paper(DIM, K)
        self.init_prototypical(parts.encoder, parts.decoder, layer, **{"warmup_epochs": 1} | options)


def digits() -> Tensor:
    return torch.from_numpy(load_digits().data[:640] / 16).float()


def loader(shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(digits()), batch_size=64, shuffle=shuffle)


def callback(**options: Any) -> PrototypeCallback:
    return PrototypeCallback("encoder", **{"latent_dim": DIM, "num_prototypes": K} | options)


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    choices = quiet | {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False} | options
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **choices)


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    first, second = tensors(a.state_dict()), tensors(b.state_dict())
    assert list(first) == list(second)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors in nested dictionaries, with the optimizers' state."""
    if isinstance(state, Tensor):
        return {name: state}
    return (
        {k: v for key, value in state.items() for k, v in tensors(value, f"{name}.{key}").items()}
        if isinstance(state, dict)
        else {}
    )


def test_fit_with_clipping_and_accumulation(tmp_path: Path) -> None:
    module = AE()
    before = module.reconstruction(digits()).item()
    run = trainer(tmp_path, callback(), gradient_clip_val=1.0, accumulate_grad_batches=2, logger=CSVLogger(tmp_path))
    run.fit(module, loader(shuffle=True))
    assert module.automatic_optimization
    assert run.global_step == EPOCHS * 5
    assert module.prototypes.steps == EPOCHS * 10
    assert module.reconstruction(digits()).item() < 0.7 * before
    known = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert id(module.prototypes.head.prototypes) in known
    assert 1 < run.callback_metrics["prototypes/perplexity"] <= K
    # The values are logged by epoch. The counts began anew after each epoch.
    rows = (Path(run.logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + EPOCHS
    assert "prototypes/perplexity" in rows[0]


@pytest.mark.filterwarnings("ignore:warmup_epochs = 3 covers all 2")  # the interrupted half warns
@pytest.mark.parametrize("saved_at", ["epoch", "step"])
@pytest.mark.parametrize("algorithm", ["callback", "paper", "balanced"])
# Lightning first ends the epoch that the checkpoint was saved in.
@pytest.mark.filterwarnings("ignore:metrics. no latent was counted:proto_reg.PrototypeWarning")
def test_a_resumed_run_ends_with_the_same_numbers(tmp_path: Path, algorithm: str, saved_at: str) -> None:
    def build() -> L.LightningModule:
        torch.manual_seed(1)
        return AE() if algorithm == "callback" else Paper(schedule=algorithm, warmup_epochs=3)

    def ours() -> PrototypeCallback:
        return callback(schedule=Schedule(warmup_steps=5)) if algorithm == "callback" else PrototypeCallback()

    class Reseed(L.Callback):  # the paper's target draws random numbers, and Lightning does not keep the random state
        def on_train_batch_start(self, run: L.Trainer, *others: Any) -> None:
            torch.manual_seed(run.global_step)

    def fit(module: L.LightningModule, folder: str, max_epochs: int, ckpt_path: Path | None = None) -> L.Trainer:
        when = {"every_n_train_steps": 20} if saved_at == "step" else {}  # the last step of an epoch, before its end
        saving = ModelCheckpoint(tmp_path / folder, save_last=True, **when)
        run = trainer(tmp_path, ours(), Reseed(), saving, max_epochs=max_epochs, enable_checkpointing=True)
        run.fit(module, loader(), ckpt_path=ckpt_path)
        return run

    whole, resumed = build(), build()
    uninterrupted = fit(whole, "whole", EPOCHS)
    fit(build(), "halves", 2)
    again = fit(resumed, "halves", EPOCHS, tmp_path / "halves" / "last.ckpt")
    assert again.global_step == uninterrupted.global_step == EPOCHS * 10
    assert_equal_states(whole, resumed)
    for key, value in uninterrupted.callback_metrics.items():
        assert torch.equal(value, again.callback_metrics[key]) or value.isnan(), key
    if algorithm == "paper":
        assert resumed.prototypical.regularizer.steps == 10  # three epochs of warm-up and one of regularisation
        assert len(resumed.state_dict()["prototypical._extra_state"]["optimizers"]) == 3


def test_a_checkpoint_is_tested_and_loaded_elsewhere(tmp_path: Path) -> None:
    module = AE()
    run = trainer(tmp_path, callback(), max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    (results,) = trainer(tmp_path, callback()).test(AE(), loader(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert results["test_loss"] == pytest.approx(module.eval().reconstruction(digits()).item(), rel=1e-5)
    other = AE()
    attach(other, "encoder", DIM, K)
    other.load_state_dict(torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"])
    assert_equal_states(module, other)


def test_bf16(tmp_path: Path) -> None:
    module = AE()
    before = module.reconstruction(digits()).item()
    run = trainer(tmp_path, callback(), precision="bf16-mixed")
    run.fit(module, loader())
    assert module.reconstruction(digits()).item() < 0.7 * before
    assert {t.dtype for t in module.prototypes.state_dict().values()} <= {torch.float32, torch.int64}
    assert 1 < run.callback_metrics["prototypes/perplexity"] <= K


@pytest.mark.parametrize("schedule", ["paper", "balanced"])
def test_algorithm_1_counts_a_batch_once_and_takes_every_flag(tmp_path: Path, schedule: str) -> None:
    module = Paper(schedule=schedule)
    run = trainer(tmp_path, gradient_clip_val=1.0, accumulate_grad_batches=2, precision="bf16-mixed")
    start = module.prototypical.regularizer.head.prototypes.clone()
    run.fit(module, loader())
    assert run.global_step == EPOCHS * 5
    assert module.prototypical.regularizer.steps == (EPOCHS - 1) * 10
    assert not torch.equal(module.prototypical.regularizer.head.prototypes, start)
    assert {"train/reconstruction", "train/prototype", "train/mmd"} <= set(run.callback_metrics)
    assert module.prototypical.regularizer.metrics()["perplexity"] >= 1  # the isolated steps count, too


@pytest.mark.filterwarnings("ignore:attach leaves the model:proto_reg.PrototypeWarning")
def test_the_layer_goes_where_the_users_optimizer_finds_it(tmp_path: Path) -> None:
    class Wrapping(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vae = AE()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.vae.reconstruction(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam([*self.vae.encoder.parameters(), *self.vae.decoder.parameters()])

    module = Wrapping()
    run = trainer(tmp_path, PrototypeCallback("vae.encoder", latent_dim=DIM, num_prototypes=K), max_epochs=1)
    run.fit(module, loader())
    assert module.prototypes.head.prototypes in run.optimizers[0].state
    assert "prototypes/perplexity" in run.callback_metrics
    inner = AE()
    trainer(tmp_path, PrototypeCallback("encoder.2", latent_dim=DIM, num_prototypes=K), max_epochs=1).fit(
        inner, loader()
    )
    assert inner.prototypes.steps == 10


class FolderOfFigures(Logger):
    """A logger that keeps all figures. It has TensorBoard's ``experiment.add_figure``."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.name, self.version, self.experiment = folder, "figures", 0, self

    name, version, experiment = None, None, None

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        figure.savefig(self.folder / f"{tag}-at-{step}.png")

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        pass


def test_pictures_change_nothing_in_the_training(tmp_path: Path) -> None:
    modules = []
    options = {"decode": "decode", "image_shape": (1, 8, 8), "every_n_epochs": 2}
    for number, (drawing, logger) in enumerate([({}, False), (options, False), (options, FolderOfFigures(tmp_path))]):
        torch.manual_seed(1)
        modules.append(AE())
        folder = tmp_path / str(number)
        trainer(folder, callback(num_prototypes=3, **drawing), logger=logger).fit(modules[-1], loader(shuffle=True))
        drawn = sorted(path.name for path in (folder / "prototypes").glob("*.png"))
        assert drawn == (["prototypes-0001.png", "prototypes-0003.png"] if number == 1 else [])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["prototypes-at-20.png", "prototypes-at-40.png"]
    assert_equal_states(modules[0], modules[1])
    assert_equal_states(modules[0], modules[2])


def test_a_warm_up_as_long_as_the_training_is_warned_of(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(schedule=Schedule(warmup_steps=20)), max_epochs=2)
    with pytest.warns(PrototypeWarning, match="warmup_steps = 20 covers all 20 steps of the training"):
        run.fit(AE(), loader())
    endless = trainer(
        tmp_path,
        callback(schedule=Schedule(warmup_steps=20)),
        max_epochs=-1,
        limit_train_batches=2,
        max_time={"seconds": 0},
    )
    endless.fit(AE(), loader())


def test_errors_name_the_cure(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="mode: expected 'balanced', got 'weighted': a callback cannot add to your loss"
    ):
        callback(mode="weighted")
    with pytest.raises(ValueError, match="encode: expected the name of a submodule, or a module with a layer"):
        trainer(tmp_path, PrototypeCallback()).fit(AE(), loader())
    with pytest.raises(ValueError, match=r"got 'encode'. Choose from \['encoder'"):
        trainer(tmp_path, PrototypeCallback("encode", latent_dim=DIM, num_prototypes=K)).fit(AE(), loader())


def test_a_missing_framework_is_named_with_its_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['lightning'] = None; import proto_reg.integrations.lightning"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "needs Lightning. Run: pip install 'proto_reg[lightning]'" in result.stderr


DDP = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_integrations_lightning import AE, Paper, PrototypeCallback, callback, loader, tensors, trainer
if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, build, ours in (("callback", AE, callback()), ("paper", Paper, PrototypeCallback())):
        torch.manual_seed(0)
        module = build()
        run = trainer({folder!r}, ours, devices=2, strategy="ddp", max_epochs=2)
        run.fit(module, loader(shuffle=True))
        assert run.world_size == 2 and run.global_step == 2 * 5, run.global_step
        metrics = {{key: float(value) for key, value in run.callback_metrics.items() if "prototypes/" in key}}
        torch.save((tensors(module.state_dict()), metrics), f"{folder}/{{name}}-{{run.global_rank}}.pt")
"""


@pytest.mark.slow
def test_ddp_with_its_default_flags(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    for name in ("callback", "paper"):
        (first, metrics), (second, theirs) = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        assert list(first) == list(second)
        for key, value in first.items():
            if "running" not in key and "num_batches" not in key:  # batch norm: each process has seen only its half
                assert torch.equal(value, second[key]), key
        assert metrics == theirs


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "lightning_callback.py"), "--epochs", "10"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    mse = float(result.stdout.split("test MSE ")[1].split(",")[0])
    purity = float(result.stdout.split("purity ")[1].split(",")[0])
    assert mse < 0.02
    assert purity > 0.7
    assert "prototypes/perplexity" in result.stdout
    assert len(list(tmp_path.rglob("prototypes-*.png"))) == 1
