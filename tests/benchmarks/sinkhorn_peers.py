"""Balanced assignment in other packages: functions of scores (B, K) that return codes (B, K).

A peer need not be installed. ``peers`` names the missing ones and says how to install them. No code here is copied from
a peer. If no package offers a method, it is written here from its formula.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from sinkhorn_race import swav
from torch import Tensor

from proto_reg import _peers
from proto_reg._bench import EPSILON, NUM_ITERS

Method = Callable[[Tensor], object]


def peers(scores: Tensor) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods by name, which take ``scores``, and the missing peers with the reason."""
    found: dict[str, Method] = {"DINOv2": dinov2, "plain torch logsumexp": log_domain}
    missing = {}
    for name, (load, cure) in LOADERS.items():
        try:
            found[name] = load(scores)
        except ImportError as error:
            missing[name] = f"not installed ({error}): {cure}"
    return found, missing


def dinov2(scores: Tensor) -> Tensor:
    """DINOv2's teacher codes: SwAV's algorithm, in float32 for every input dtype."""
    return swav(scores.float())


@torch.no_grad()
def log_domain(scores: Tensor) -> Tensor:
    """Alternating logsumexp over rows and columns. This is the obvious safe form."""
    x = scores / EPSILON
    for _ in range(NUM_ITERS):
        x = x - x.logsumexp(0, keepdim=True) - math.log(x.shape[1])
        x = x - x.logsumexp(1, keepdim=True) - math.log(x.shape[0])
    return (x + math.log(x.shape[0])).exp()


def compiled_swav(scores: Tensor) -> Method:
    """SwAV's algorithm with torch.compile, compiled for these scores."""
    torch.compiler.reset()
    method = torch.compile(swav, dynamic=False)
    method(scores)
    return method


def _lightly(scores: Tensor) -> Method:
    sinkhorn = _lightly_module("swav_loss").sinkhorn
    return lambda scores: sinkhorn(scores, NUM_ITERS, EPSILON)


def _lightly_capi(scores: Tensor) -> Method:
    sinkhorn = _lightly_module("capi_loss").sinkhorn_knopp
    return lambda scores: sinkhorn((scores / EPSILON)[:, None], NUM_ITERS)[:, 0]


def _lightly_module(name: str):
    """One file of lightly. The package itself imports torchvision, but its Sinkhorn imports only torch."""
    package = importlib.util.find_spec("lightly")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'lightly'")
    path = Path(package.submodule_search_locations[0]) / "loss" / f"{name}.py"
    if not path.exists():
        raise ImportError(f"this version has no {path.name}")
    spec = importlib.util.spec_from_file_location(f"lightly_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _package(name: str, scores: Tensor) -> Method:
    method = _peers.PACKAGES[name][0]()
    return lambda scores: method(scores, EPSILON, NUM_ITERS)


# For each peer: a function that loads it for scores like these, and the command that installs it.
LOADERS: dict[str, tuple[Callable[[Tensor], Method], str]] = {
    "lightly": (_lightly, "pip install --no-deps lightly"),
    "lightly CAPI": (_lightly_capi, "pip install --no-deps lightly"),
    **{name: (partial(_package, name), cure) for name, (_, cure) in _peers.PACKAGES.items()},
}
