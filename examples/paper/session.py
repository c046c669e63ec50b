"""All runs of a config. Finished runs stay, failed runs stay with their traceback, and all others are trained."""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import proto_reg

from .config import Config, RunConfig
from .data import load_far, load_images, split
from .methods import METHODS, Method, Plan, build_method
from .metrics import evaluate
from .models import build_network
from .prior_metrics import evaluate_prior
from .priors import fit_prior
from .records import KEY, Records, held
from .train import history_of, train, trained_run
from .trained import ImageData


@dataclass(frozen=True)
class Run:
    """One line of ``runs.jsonl``: a row of the config with one seed."""

    config: Config
    spec: RunConfig
    seed: int
    split: str

    def training(self) -> dict[str, Any]:
        """All settings that change the trained weights."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("name", "runs", "seeds")}
        method = METHODS[self.spec.method]
        options = method.training_options(self.spec.options)
        identity = {"method": method.trained_as, "options": options, "trace_steps": self.spec.trace_steps}
        return settings | identity | {"seed": self.seed, "split": self.split}

    @property
    def id(self) -> str:
        """A digest of the settings. After an edit of the config, it differs and the run is new."""
        return _digest(self.training() | {"method": self.spec.method, "options": self.spec.options} | self.prior())

    def prior(self) -> dict[str, Any]:
        """The options of the prior. They do not change the training. Empty for a run that samples as the paper does."""
        spec = self.spec
        gmm = {"num_prototypes": spec.components} if spec.prior == "gmm" else {}
        return {} if spec.prior is None else {"prior": spec.prior} | gmm

    @property
    def checkpoint(self) -> str:
        """The name of the weights' file. Methods with the same training share it."""
        return f"{METHODS[self.spec.method].trained_as}-s{self.seed}-{_digest(self.training())}.pt"

    @property
    def name(self) -> str:
        """The name of the arrays' file."""
        label = re.sub(r"[^a-z0-9.]+", "-", self.spec.label.lower()).strip("-")
        return f"{self.config.name}-{label}-s{self.seed}"

    @property
    def key(self) -> dict[str, Any]:
        return {"config": self.config.name, "split": self.split, "label": self.spec.label, "seed": self.seed}

    def wanted(self, only: list[str] | None) -> bool:
        return only is None or self.spec.method in only or self.spec.label in only


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def runs_of(config: Config, split: str, seeds: int | None = None, only: list[str] | None = None) -> list[Run]:
    """All runs, seed by seed, so that every method has an early first result. Unknown names raise ValueError."""
    known = {name for spec in config.runs for name in (spec.method, spec.label)}
    if only and (unknown := set(only) - known):
        raise ValueError(f"--only: expected methods or labels among {sorted(known)}, got {sorted(unknown)}.")
    count = config.seeds if seeds is None else seeds
    runs = [
        Run(config, spec, seed, split)
        for seed in range(count)
        for spec in config.runs
        if seed < min(count, count if spec.seeds is None else spec.seeds)
    ]
    return [run for run in runs if run.wanted(only)]


@dataclass(frozen=True)
class Session:
    """The folder for results, and the action for results that exist already.

    Attributes:
        retry: train failed runs again. again: evaluate finished runs again, from their checkpoints.
        far_dir: the folder of another data set. Runs with a prior are also judged on telling it apart.
    """

    out: Path
    device: torch.device
    retry: bool = False
    again: bool = False
    far_dir: Path | None = None

    @property
    def work(self) -> Path:
        """The folder for checkpoints, locks and the metrics' cache. It is not for version control."""
        folder = self.out / "work"
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".gitignore").write_text("*\n")
        return folder

    @property
    def records(self) -> Records:
        return Records(self.out / "runs.jsonl", self.work / "runs.lock")

    def pending(self, runs: list[Run]) -> list[Run]:
        """The runs that this call has to do."""
        at_rest = {status for status, redo in (("done", self.again), ("failed", self.retry)) if not redo}
        there = [(r["id"], {name: r[name] for name in KEY}) for r in self.records.all() if r["status"] in at_rest]
        return [run for run in runs if (run.id, run.key) not in there]

    def run(self, runs: list[Run], data_dir: Path | None) -> list[dict[str, Any]]:
        """Do the pending runs. Return the records of all ``runs`` that have one, in order.

        Several processes may do this at the same time. A run that another process is doing is left to it.
        """
        pending = self.pending(runs)
        if pending:
            data = self._data(pending[0], data_dir)
            self._far(data)  # a wrong folder fails here, and not after the first training
            with tqdm(total=sum(run.config.epochs for run in pending), unit="epoch", smoothing=0.05) as bar:
                for number, (run, record) in enumerate(self._claimed(pending, data, bar), 1):
                    bar.write(f"[{number}/{len(pending)}] {run.spec.label}, seed {run.seed}: {_summary(record)}")
        found = [self.records.find(id=run.id, **run.key) for run in runs]
        return [record for record in found if record is not None]

    def _claimed(self, pending: list[Run], data: ImageData, bar: tqdm) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Do the runs that no other process holds. Yield each one with its record.

        This ends when other processes hold all remaining runs.
        """
        while pending:
            left = []
            for run in pending:
                with held(self.work / f"{run.checkpoint}.lock", wait=False) as mine:
                    if not mine:
                        left.append(run)
                    elif self.again or self.pending([run]):
                        yield run, self._record(run, data, bar)
            if len(left) == len(pending):
                bar.write(f"left to another process: {', '.join(sorted({run.spec.label for run in left}))}")
                return
            pending = self.pending(left)

    def _data(self, run: Run, data_dir: Path | None) -> ImageData:
        config = run.config
        images = load_images(config.data, data_dir)
        data = split(images, run.split, config.train_images, config.test_images, config.validation_images)
        tensors = {name: x.to(self.device) for name, x in vars(data).items() if isinstance(x, torch.Tensor)}
        return ImageData(data.name, data.shape, **tensors)

    def _far(self, data: ImageData) -> tuple[str, torch.Tensor] | None:
        return None if self.far_dir is None else load_far(self.far_dir, data.shape)

    def _record(self, run: Run, data: ImageData, bar: tqdm) -> dict[str, Any]:
        """Train and judge one run and write its line, also after a failure."""
        bar.set_description(f"{run.spec.label}, seed {run.seed}")
        record = {
            "id": run.id,
            **run.key,
            "data": data.name,
            "model": run.config.model_name,
            "method": run.spec.method,
            "options": (options := run.spec.options | run.prior()),
            "num_prototypes": options.get("num_prototypes"),
            "epochs": run.config.epochs,
            "status": "done",
            "error": None,
            "history": [],
            "metrics": {},
            "step_ms": None,
            "parameters": None,
            "seconds": None,
            "versions": self._versions(),
            "arrays": None,
        }
        began = bar.n
        try:
            record |= self._results(run, data, bar)
        except Exception:
            record |= {"status": "failed", "error": _without_folders(traceback.format_exc())}
            record["history"] = history_of(self.work / run.checkpoint)
        # This adds the epochs that a checkpoint or a failure leaves out.
        bar.update(began + run.config.epochs - bar.n)
        self.records.put(record)
        return record

    def _results(self, run: Run, data: ImageData, bar: tqdm) -> dict[str, Any]:
        method = new_method(run, data, self.device)

        def on_epoch(epoch: int, errors: dict[str, float]) -> None:
            bar.update()
            bar.set_postfix({name: f"{value:.4f}" for name, value in errors.items()})

        checkpoint = self.work / run.checkpoint
        progress = train(method, data, run.config, checkpoint, run.spec.trace_steps, on_epoch)
        torch.manual_seed(run.seed)
        metrics, arrays = self._judged(run, method, data)
        if progress["trace"] is not None:
            arrays["trace"] = progress["trace"].numpy()
            arrays["trace_steps"] = np.array(["before", *method.optimizers])
        warm = progress["step_ms"][run.config.warmup_epochs :]
        return {
            "history": progress["history"],
            "metrics": {name: float(value) for name, value in metrics.items()},
            "step_ms": median(warm),
            "parameters": sum(p.numel() for p in method.parameters()),
            "seconds": sum(progress["epoch_seconds"]),
            "arrays": self._keep(run, arrays),
        }

    def _judged(self, run: Run, method: Method, data: ImageData) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The metrics and arrays of the trained ``method``."""
        spec, trained = run.spec, trained_run(run.spec.method, method, data)
        if spec.prior is None:
            K = spec.options.get("num_prototypes", 30)
            return evaluate(trained, num_prototypes=K, cache=self.work)
        z = trained.encode(data.train_images)
        prior = fit_prior(spec.prior, z, trained.head, spec.components, run.seed)
        return evaluate_prior(trained, prior, cache=self.work, far=self._far(data))

    def _keep(self, run: Run, arrays: dict[str, np.ndarray]) -> str:
        path = self.out / "arrays" / f"{run.name}.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(path, **arrays)
        return path.relative_to(self.out).as_posix()

    def _versions(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        versions = {"torch": torch.__version__, "proto_reg": proto_reg.__version__}
        return versions | {"threads": torch.get_num_threads(), "device": device}


def new_method(run: Run, data: ImageData, device: torch.device) -> Method:
    """The untrained method. The network's weights depend only on the seed, and are drawn before the method's own."""
    config = run.config
    torch.manual_seed(run.seed)
    network = build_network(config.model, data.shape, config.latent_dim, config.maps, config.width)
    steps = -(-len(data.train_images) // config.batch_size)
    plan = Plan(config.epochs, config.warmup_epochs, steps, config.batch_size, config.learning_rate, run.seed)
    method = build_method(run.spec.method, network, plan, run.spec.options)
    return method.to(device, memory_format=torch.channels_last)  # convolutions are a third faster, also on a CPU


def _summary(record: dict[str, Any]) -> str:
    if record["status"] == "failed":
        return f"FAILED: {record['error'].strip().splitlines()[-1]}"
    last = record["history"][-1]
    return f"test MSE {last['test_mse']:.5f}, {record['seconds']:.0f} s, {record['step_ms']:.1f} ms a step"


def _without_folders(trace: str) -> str:
    """A traceback with only the folder and the name of each file. The paths of this machine stay private."""
    return re.sub(r'File "(?:.*/)?([^/"]+/[^/"]+)"', r'File "\1"', trace)
