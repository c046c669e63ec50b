"""Sinkhorn in plain torch as a GPU runs it: few operations, no read by the host, and right for scores of any span."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import balanced, cosines
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from proto_reg.functional import sinkhorn
from proto_reg.kernels.sinkhorn_reference import sinkhorn_reference
from proto_reg.kernels.sinkhorn_scaling import scale_plans

VIEWS = ("view", "unsqueeze", "squeeze", "transpose", "select", "slice", "expand", "detach")


class Operations(TorchDispatchMode):
    """Counts the operations that a device would launch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:
        self.count += function.__name__.split(".")[0] not in VIEWS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(256, 30), (4, 256, 30)])
@pytest.mark.parametrize(("options", "most"), [({}, 34), ({"weights": True}, 56), ({"marginals": True}, 52)])
def test_a_device_gets_few_operations_and_no_question(shape: tuple[int, ...], options: dict, most: int) -> None:
    """SwAV's algorithm takes 23. On a meta tensor, a read by the host raises."""
    scores = torch.empty(shape, device="meta")
    weights = torch.empty(shape[:-1], device="meta") if "weights" in options else None
    marginals = torch.empty(shape[-1:], device="meta") if "marginals" in options else None
    with torch.no_grad(), Operations() as operations:
        codes, _ = sinkhorn_reference(scores, marginals, weights, 0.05, 3, None, False, False)
    assert codes.shape == shape
    assert operations.count <= most


def spread_scores(kind: str, shape: tuple[int, int], span: float) -> tuple[Tensor, dict]:
    """Scores over ``span`` epsilon, and the options of one kind."""
    scores, options = span * (torch.rand(shape) - 0.5), {}
    if kind == "-inf":
        scores.masked_fill_(torch.rand(shape) < 0.3, -math.inf)[:, 0] = 0
        scores[:, 1] = -math.inf
    elif kind == "rows":
        scores += span * torch.randn(shape[0], 1)
    elif kind == "columns":
        scores += span * torch.randn(shape[1])
    elif kind == "weights":
        options["weights"] = (2 * torch.rand(shape[0])).index_fill(0, torch.arange(1, shape[0], 5), 0)
    elif kind == "marginals":
        shares = torch.rand(shape[1])
        shares[1], shares[2] = 0, 1e-12
        options["marginals"] = shares / shares.sum()
    return scores, options


@pytest.mark.parametrize("span", [1.0, 10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("kind", ["plain", "-inf", "rows", "columns", "weights", "marginals"])
def test_any_span_against_float64(kind: str, span: float) -> None:
    for shape in ((40, 5), (256, 30), (64, 400)):
        for num_iters in (1, 3, 8, 60):
            scores, options = spread_scores(kind, shape, span)
            marginals, weights = options.get("marginals"), options.get("weights")
            codes, potentials = scale_plans(scores, marginals, weights, 1.0, num_iters)
            expected, dual = balanced(scores, 1.0, num_iters, marginals, weights)
            # Far rows or columns make potentials that float32 rounds.
            torch.testing.assert_close(codes.double(), expected, rtol=0, atol=1e-6 if span < 100 else 1e-5)
            torch.testing.assert_close(potentials.double(), dual, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("kind", ["", "weights", "marginals", "marginals each", "mask"])
def test_groups_are_separate_problems(kind: str, narrow: bool) -> None:
    for shape in ((3, 100, 30), (2, 700, 10), (50, 4, 4)):
        scores = (1 if narrow else 50) * cosines(shape[0] * shape[1], shape[2]).view(shape)
        options: dict[str, Tensor] = {}
        if kind in ("weights", "mask"):
            options = {kind: torch.rand(shape[:2]) if kind == "weights" else torch.rand(shape[:2]) > 0.3}
        if "marginals" in kind:
            options = {"marginals": torch.rand((shape[0], shape[2]) if "each" in kind else shape[2]).softmax(-1)}
        codes, potentials = sinkhorn(scores, backend="torch", return_potentials=True, **options)
        for group in range(shape[0]):
            own = {name: value[group] if len(value) == shape[0] else value for name, value in options.items()}
            one, dual = sinkhorn(scores[group].double(), backend="torch", return_potentials=True, **own)
            torch.testing.assert_close(codes[group].double(), one, rtol=0, atol=1e-6)
            torch.testing.assert_close(potentials[group].double(), dual, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(64, 8), (3, 64, 8), (700, 8)])
def test_float32_also_inside_autocast(shape: tuple[int, ...]) -> None:
    scores = cosines(math.prod(shape[:-1]), 8).view(shape)
    for scale in (1, 50):
        expected = sinkhorn(scale * scores, backend="torch")
        with torch.autocast("cpu", torch.bfloat16):
            codes = sinkhorn(scale * scores, backend="torch")
        assert codes.dtype == torch.float32
        torch.testing.assert_close(codes, expected, rtol=0, atol=1e-6)
