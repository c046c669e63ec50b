"""The runs from ``configs/*.yaml``. A whole file is checked before the first training."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from .data import NAMES
from .methods import METHODS, Plan, build_method
from .models import MODELS, build_network
from .priors import PRIORS

FOLDER = Path(__file__).parent / "configs"
TINY = 4  # maps and width of the small network that tries the options


@dataclass(frozen=True)
class RunConfig:
    """One row of the comparison.

    Attributes:
        label: its name in tables. It is unique in a config.
        options: the options of the method, see ``methods``.
        seeds: a smaller number than the config's, for long sweeps. None takes the config's number.
        trace_steps: the number of additional steps after training. In them, the error of a fixed batch is recorded
            before and after each step of each optimizer.
        prior: None samples as the paper does. Otherwise the run is judged with this prior of ``priors``, which is
            fitted to the training latents. It shares its training with the run without a prior.
        components: the number of normals in the prior "gmm".
    """

    method: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    seeds: int | None = None
    trace_steps: int = 0
    prior: str | None = None
    components: int = 30


@dataclass(frozen=True)
class Config:
    """A data set, a network, a training, and the methods that share them.

    Attributes:
        maps: the number of maps at the start of the convolutional decoder, 256 in the paper. The MLP does not use it.
        train_images, test_images: the largest number of images. None takes all.
        validation_images: the number of training images that ``--split validation`` holds out.
        curve_images: the number of training images, and of test images, for the errors in ``history``.
    """

    name: str
    data: str
    model: str
    epochs: int
    runs: tuple[RunConfig, ...]
    maps: int = 256
    width: int = 256
    latent_dim: int = 256
    warmup_epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 1e-3
    seeds: int = 3
    train_images: int | None = None
    test_images: int | None = None
    validation_images: int = 10_000
    curve_images: int = 10_000

    @property
    def model_name(self) -> str:
        """The network's name in records."""
        return f"conv-{self.maps}" if self.model == "conv" else f"mlp-{self.width}"


def load_config(name: str) -> Config:
    """The config with this name, or from this file.

    ``base: NAME`` takes the settings of another config. ``defaults`` maps a method to the default options of all of its
    runs. A run's ``sweep`` maps an option to values. It makes a run for each combination and puts the values into the
    label's braces. A run that differs from an earlier one only in its label is left out.

    Raises:
        ValueError: there is an unknown name or key, or a value out of its range. The error names the place in the file.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    content = _read(path)
    known = {f.name for f in fields(Config)} - {"name"} | {"defaults"}
    _check_keys(path.name, content, known)
    missing = {"data", "model", "epochs", "runs"} - set(content)
    if missing:
        raise ValueError(f"{path.name}: expected {sorted(missing)}, which are missing. Add them.")
    defaults = content.pop("defaults", {})
    if not isinstance(defaults, dict) or not all(isinstance(options, dict) for options in defaults.values()):
        raise ValueError(
            f"{path.name}: defaults: expected options by method, got {defaults!r}. Write 'method: {{...}}'."
        )
    _check_keys(f"{path.name}: defaults", defaults, set(METHODS))
    runs: list[RunConfig] = []
    for i, entry in enumerate(content.pop("runs")):
        runs += _runs(f"{path.name}: runs[{i}]", entry, defaults, runs)
    config = Config(name=path.stem, runs=tuple(runs), **content)
    _check(path.name, config)
    return config


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(
            f"--config: expected a file or one of {sorted(p.stem for p in FOLDER.glob('*.yaml'))}, got {path.stem!r}. "
            "Choose one."
        )
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: expected YAML, got what is not: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected a mapping of settings, got {type(content).__name__}.")
    base = content.pop("base", None)
    return content if base is None else _read(path.with_name(f"{base}.yaml")) | content


def _check_keys(place: str, content: dict[str, Any], known: set[str]) -> None:
    unknown = set(content) - known
    if unknown:
        raise ValueError(f"{place}: expected keys among {sorted(known)}, got {sorted(unknown)}. Correct or drop them.")


def _runs(
    place: str, entry: dict[str, Any], defaults: dict[str, dict[str, Any]], earlier: list[RunConfig]
) -> list[RunConfig]:
    """The runs of one entry: one for each combination of its sweep, if it is not in ``earlier``."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: expected a mapping, got {entry!r}. Write 'method: ...' and 'label: ...'.")
    _check_keys(place, entry, {f.name for f in fields(RunConfig)} | {"sweep"})
    if entry.get("method") not in METHODS:
        raise ValueError(f"{place}.method: expected one of {sorted(METHODS)}, got {entry.get('method')!r}. Choose one.")
    if not isinstance(entry.get("label"), str):
        raise ValueError(f"{place}.label: expected a name for the tables, got {entry.get('label')!r}. Give it one.")
    entry = dict(entry)
    sweep = entry.pop("sweep", {})
    options = defaults.get(entry["method"], {}) | (entry.pop("options", {}) or {})
    runs = []
    for values in itertools.product(*sweep.values()):
        chosen = options | dict(zip(sweep, values, strict=True))
        label = entry["label"].format_map(chosen)
        run = RunConfig(**(entry | {"label": label, "options": chosen}))
        if not sweep or all(replace(other, label=label) != run for other in earlier):
            runs.append(run)
    return runs


def _check(place: str, config: Config) -> None:
    """Check the ranges, and check that every method takes its options."""
    for name, choices in (("data", NAMES), ("model", MODELS)):
        if (value := getattr(config, name)) not in choices:
            raise ValueError(f"{place}: {name}: expected one of {sorted(choices)}, got {value!r}. Choose one.")
    positive = ["epochs", "maps", "width", "latent_dim", "batch_size", "seeds", "validation_images", "curve_images"]
    positive += [name for name in ("train_images", "test_images") if getattr(config, name) is not None]
    for name in positive:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{place}: {name}: expected a whole number > 0, got {value!r}. Change it.")
    if not 0 <= config.warmup_epochs < config.epochs:
        raise ValueError(
            f"{place}: warmup_epochs: expected 0 <= warmup_epochs < epochs = {config.epochs}, got "
            f"{config.warmup_epochs}. Shorten it, or nothing is regularised."
        )
    labels = [run.label for run in config.runs]
    repeated = {label for label in labels if labels.count(label) > 1}
    if repeated:
        raise ValueError(f"{place}: runs: expected different labels, got {sorted(repeated)} twice. Rename one.")
    shape = (1, 8, 8) if config.model == "mlp" else (1, 28, 28)
    for run in config.runs:
        network = build_network(config.model, shape, config.latent_dim, TINY, TINY)
        plan = Plan(config.epochs, config.warmup_epochs, 1, config.batch_size, config.learning_rate, 0)
        try:
            build_method(run.method, network, plan, run.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {run.label}: {error}") from error
        _check_prior(f"{place}: {run.label}", run)


def _check_prior(place: str, run: RunConfig) -> None:
    if run.prior not in (None, *PRIORS):
        raise ValueError(f"{place}: prior: expected one of {sorted(PRIORS)}, got {run.prior!r}. Choose one.")
    if run.prior in ("clusters", "trained") and "num_prototypes" not in run.options:
        raise ValueError(
            f"{place}: prior: expected a method with prototypes for {run.prior!r}, got {run.method}. Use kmeans or gmm."
        )
    if run.prior == "trained" and run.method == "kmeans":
        raise ValueError(f"{place}: prior: expected a method with our layer for 'trained', got kmeans. Use 'clusters'.")
    if not isinstance(run.components, int) or run.components < 1:
        raise ValueError(f"{place}: components: expected a whole number > 0, got {run.components!r}. Change it.")
