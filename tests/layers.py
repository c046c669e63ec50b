"""Layers with each option that changes a training step."""

from __future__ import annotations

from collections.abc import Callable

from proto_reg import AnchoredMMDLoss, LatentQueue, PrototypeHead, PrototypicalRegularizer, Schedule, SinkhornAssigner

DIM, K = 8, 5
SHARES = [0.1, 0.3, 0.2, 0.15, 0.25]
# Each function makes new options, because a component belongs to one layer.
OPTIONS: dict[str, Callable[[], dict]] = {
    "plain": dict,
    "schedules": lambda: {"schedule": Schedule(warmup_steps=2, mmd_steps=3, ramp_steps=3)},
    "temperature": lambda: {"schedule": Schedule(temperature=(0.3, 0.1), temperature_steps=5)},
    "queue": lambda: {"queue": LatentQueue(40, DIM)},
    "queue and subsample": lambda: {"queue": LatentQueue(40, DIM), "mmd": AnchoredMMDLoss(max_tokens=16)},
    "max_tokens": lambda: {"mmd": AnchoredMMDLoss(max_tokens=16)},
    "features": lambda: {"mmd": AnchoredMMDLoss(features=8)},
    "sampled": lambda: {"mmd": AnchoredMMDLoss(target="sampled")},
    "imq": lambda: {"mmd": AnchoredMMDLoss("imq", statistic="biased")},
    "energy": lambda: {"mmd": AnchoredMMDLoss("energy", reduction="sum")},
    "isolate": lambda: {"assigner": SinkhornAssigner(nan_policy="isolate", marginals=SHARES, tol=1e-3)},
    "dot": lambda: {"head": PrototypeHead(DIM, K, similarity="dot", std=0.5)},
    "euclidean": lambda: {"head": PrototypeHead(DIM, K, similarity="euclidean")},
    "torch": lambda: {"assigner": SinkhornAssigner(backend="torch")},
    "maps": lambda: {"layout": "b d n"},
    "without tracking": lambda: {"mmd": AnchoredMMDLoss(max_tokens=16), "schedule": Schedule(mmd_steps=0)},
}


def layer_with(options: str, **others: object) -> PrototypicalRegularizer:
    """A layer with the options of this name in ``OPTIONS``, and with ``others``."""
    layer = PrototypicalRegularizer(DIM, K, **(OPTIONS[options]() | others))
    layer.tracking = options != "without tracking"
    return layer
