"""Bad input raises an error of our own at every entrance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import proto_reg
from proto_reg import functional

FLOAT8 = [dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and "float8" in str(dtype)]


def entrances() -> dict[str, tuple[str, Callable[[Tensor], object]]]:
    """All calls that take latents or scores (6, 4): the name of the argument, and the call."""
    layer, head = proto_reg.PrototypicalRegularizer(4, 3), proto_reg.PrototypeHead(4, 3)
    assigner, hard = proto_reg.SinkhornAssigner(), torch.zeros(6, dtype=torch.int64)
    rows, anchors = torch.randn(6, 4), torch.randn(3, 4)
    return {
        "layer": ("z", layer),
        "layer in eval": ("z", proto_reg.PrototypicalRegularizer(4, 3).eval()),
        "weighted layer": ("z", proto_reg.PrototypicalRegularizer(4, 3, mode="weighted")),
        "losses": ("z", layer.losses),
        "head": ("z", head),
        "init_from": ("z", head.init_from),
        "log_prob": ("value", head.mixture().log_prob),
        "responsibilities": ("value", head.mixture().responsibilities),
        "assigner": ("scores", assigner),
        "assigner's gradient": ("scores", lambda x: assigner.cross_entropy_and_gradient(x, 0.1)),
        "mmd": ("z", lambda x: proto_reg.AnchoredMMDLoss()(x, anchors, hard)),
        "sinkhorn": ("scores", functional.sinkhorn),
        "sinkhorn of groups": ("scores", lambda x: functional.sinkhorn(x[None])),
        "sinkhorn with a graph": ("scores", lambda x: functional.sinkhorn(x, differentiable=True)),
        "weights": ("weights", lambda x: functional.sinkhorn(rows, weights=x[:, 0])),
        "sinkhorn_cross_entropy": ("scores", functional.sinkhorn_cross_entropy),
        "and its gradient": ("scores", functional.sinkhorn_cross_entropy_and_gradient),
        "prototype_cross_entropy": ("scores", lambda x: functional.prototype_cross_entropy(x, rows)),
        "its codes": ("codes", lambda x: functional.prototype_cross_entropy(rows, x)),
        "prototype_scores": ("z", lambda x: functional.prototype_scores(x, anchors)),
        "prototypes": ("prototypes", lambda x: functional.prototype_scores(rows, x)),
        "anchored_mmd": ("z", lambda x: functional.anchored_mmd(x, anchors, hard)),
        "anchors": ("anchors", lambda x: functional.anchored_mmd(rows, x, hard)),
        "soft members": ("assignments", lambda x: functional.anchored_mmd(rows, rows[:4], x)),
        "latent_metrics": ("z", lambda x: functional.latent_metrics(x, head)),
        "with_noise": ("z", lambda x: functional.with_noise(x, 0.1)),
    }


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("entrance", entrances())
def test_float8_is_refused(entrance: str, dtype: torch.dtype) -> None:
    name, call = entrances()[entrance]
    with pytest.raises(TypeError, match=rf"{name}: expected float16, bfloat16, float32 or float64, got .*{dtype}"):
        call(torch.ones(6, 4).to(dtype))


@pytest.mark.parametrize("entrance", entrances())
def test_integers_are_refused(entrance: str) -> None:
    name, call = entrances()[entrance]
    wanted = "assignments: expected int64" if name == "assignments" else f"{name}: expected a floating-point tensor"
    with pytest.raises(TypeError, match=wanted):
        call(torch.ones(6, 4, dtype=torch.int32))
