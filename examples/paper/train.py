"""Training of one method from one seed. It resumes after any epoch, bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Config
from .methods import Method, inference
from .methods.baselines import VAE
from .records import replacing
from .trained import ImageData, TrainedRun

CHUNK = 2000  # number of images at a time, without gradients


def train(
    method: Method,
    data: ImageData,
    config: Config,
    checkpoint: Path,
    trace_steps: int = 0,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train ``method`` in place until ``config.epochs`` are done in all, from ``checkpoint`` if it exists.

    Every epoch draws its order, and the noise of its steps, from its own seeds. So the random state is only the number
    of the epoch.

    Args:
        on_epoch: a function that is called after the checkpoint of each epoch. It gets the number of finished epochs
            and their errors.

    Returns:
        ``history``, ``epoch_seconds``, ``step_ms`` of each epoch, and ``trace`` (trace_steps, 1 + steps a batch).

    Raises:
        FloatingPointError: the training diverged.
    """
    progress: dict[str, Any] = {
        "epoch": 0,
        "finished": False,
        "trace": None,
        "history": [],
        "epoch_seconds": [],
        "step_ms": [],
    }
    device = data.train_images.device
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        progress = saved["progress"]
        method.load_state_dict(saved["method"])
        for name, state in saved["optimizers"].items():
            method.optimizers[name].load_state_dict(state)
    while progress["epoch"] < config.epochs:
        epoch = progress["epoch"]
        started = time.perf_counter()
        progress["step_ms"].append(train_epoch(method, data, config.batch_size, epoch))
        errors = curve(method, data, config.curve_images)
        if not all(map(math.isfinite, errors.values())):
            raise FloatingPointError(f"{errors} after epoch {epoch + 1}")
        progress["epoch"] = epoch + 1
        progress["history"].append({"epoch": epoch + 1, **errors})
        progress["epoch_seconds"].append(time.perf_counter() - started)
        save(checkpoint, method, progress, method.optimizers)
        if on_epoch is not None:
            on_epoch(epoch + 1, errors)
    method.begin_epoch(config.epochs)
    if not progress["finished"]:
        if trace_steps:
            progress["trace"] = traced(method, data, config, trace_steps, checkpoint)
        progress["finished"] = True
        save(checkpoint, method, progress, {})  # for the evaluation
    return progress


def save(checkpoint: Path, method: Method, progress: dict[str, Any], optimizers: dict[str, Any]) -> None:
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with replacing(checkpoint) as part:
        torch.save({"progress": progress, "method": method.state_dict(), "optimizers": states}, part)


def history_of(checkpoint: Path) -> list[dict[str, float]]:
    """The errors of the finished epochs. There are none without a checkpoint."""
    return torch.load(checkpoint, weights_only=True)["progress"]["history"] if checkpoint.exists() else []


def batches(data: ImageData, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The indices of an epoch's batches. They are the same for all methods."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
    return list(torch.randperm(len(data.train_images), generator=generator).split(batch_size))


def train_epoch(method: Method, data: ImageData, batch_size: int, epoch: int) -> float:
    """Train one epoch. Return the milliseconds of a step."""
    method.begin_epoch(epoch)
    method.train()
    torch.manual_seed(1_000_003 * (method.plan.seed + 1) + epoch)
    indices = batches(data, batch_size, method.plan.seed, epoch)
    started = time.perf_counter()
    for index in indices:
        method.step(data.train_images[index.to(data.train_images.device)])
    if data.train_images.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started) / len(indices)


def curve(method: Method, data: ImageData, count: int) -> dict[str, float]:
    """The errors per pixel of the first ``count`` training and test images, after the last step of an epoch."""
    with inference(method):
        return {
            f"{split}_mse": _mse(method, images[:count]).item()
            for split, images in (("train", data.train_images), ("test", data.test_images))
        }


def _mse(method: Method, images: Tensor) -> Tensor:
    total = sum(((method.decode(method.encode(x)) - x).square().sum() for x in images.split(CHUNK)), torch.zeros(()))
    return total / images.numel()


def traced(method: Method, data: ImageData, config: Config, steps: int, checkpoint: Path) -> Tensor:
    """The errors (steps, 1 + optimizers) of a fixed test batch, before each step and after each optimizer's part of it.

    Training takes ``steps`` more steps. Then it goes back to ``checkpoint``.
    """
    fixed, row, rows = data.test_images[: config.batch_size], [], []

    def observe(*_: Any) -> None:
        with inference(method):
            row.append(_mse(method, fixed).cpu())

    method.begin_epoch(config.epochs)
    method.train()
    hooks = [optimizer.register_step_post_hook(observe) for optimizer in method.optimizers.values()]
    torch.manual_seed(method.plan.seed)
    indices = batches(data, config.batch_size, method.plan.seed, config.epochs)
    for step in range(steps):
        row.clear()
        observe()
        method.step(data.train_images[indices[step % len(indices)].to(fixed.device)])
        rows.append(torch.stack(row))
    for hook in hooks:
        hook.remove()
    method.load_state_dict(torch.load(checkpoint, weights_only=True, map_location=fixed.device)["method"])
    return torch.stack(rows)


def trained_run(name: str, method: Method, data: ImageData) -> TrainedRun:
    """``method`` in the form that evaluation takes."""
    method.eval()
    device = data.train_images.device

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        return torch.cat([method.encode(x.to(device)) for x in images.split(CHUNK)])

    @torch.no_grad()
    def decode(z: Tensor) -> Tensor:
        return torch.cat([method.decode(part.to(device)) for part in z.split(CHUNK)])

    method.prepare(encode(data.train_images).cpu())
    head = deepcopy(method.head).to(device).requires_grad_(False) if method.head is not None else None

    def sample(n: int, generator: torch.Generator) -> Tensor:
        return decode(method.prior(n, generator))

    with inference(method):
        z = encode(data.test_images)
        logits = (method.network.decoder(part) for part in z.split(CHUNK))
        parts = zip(logits, data.test_images.split(CHUNK), strict=True)
        nats = sum(F.binary_cross_entropy_with_logits(a, x, reduction="sum").item() for a, x in parts)

    @torch.no_grad()
    def posterior(images: Tensor) -> Tensor:
        return torch.cat([method.sample_posterior(x.to(device))[0] for x in images.split(CHUNK)])

    drawn = posterior if isinstance(method, VAE) else None
    return TrainedRun(name, data, encode, decode, sample, head, nats / data.test_images.numel(), drawn)
