"""The Triton kernels in Triton's interpreter, against float64. test_triton.py runs this file with TRITON_INTERPRET=1.

The tables and the checks are those of the CUDA source (test_cuda_source.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import test_cuda_source as cuda
import torch
from conftest import cosines
from emulation.emulator import Result
from torch import Tensor

from proto_reg.kernels import sinkhorn_triton
from proto_reg.kernels.sinkhorn_reference import sinkhorn_cross_entropy_reference, sinkhorn_reference

# NumPy stands for the GPU, and warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

WAYS = {"one program": 1 << 20, "streamed": 0}  # ON_CHIP, which decides between the two
TESTS = (
    cuda.test_ragged_shapes,
    cuda.test_iterations,
    cuda.test_a_single_prototype,
    cuda.test_robustness_columns,
    cuda.test_the_largest_finite_scores,
    cuda.test_many_iterations_over_a_wide_range,
    cuda.test_marginals,
    cuda.test_weights,
    cuda.test_nan_policies,
    cuda.test_tol,
    cuda.test_a_column_that_gets_nothing_saves_no_row,
    cuda.test_tol_where_a_column_has_no_mass,
    cuda.test_groups,
)


@pytest.fixture(scope="session")
def built() -> None:
    """These tests do not wait for the CPU kernels."""


def solve(library: str, scores: Tensor, *, temperature=None, allow=None, **options) -> Result:
    """The emulation's function of this name, by Triton."""
    options = {"epsilon": 0.05, "num_iters": 3, "tol": None, "isolate": False, **options}
    names = ("marginals", "weights", "epsilon", "num_iters", "tol", "isolate")
    arguments = [options.get(name) for name in names]
    codes = torch.full_like(scores, math.nan)
    potentials, loss, gradient = sinkhorn_triton.solve(scores, *arguments, temperature, codes)
    loss = torch.full((1,), math.nan) if loss is None else loss[None]
    return Result(codes, potentials, loss, gradient, SimpleNamespace(name=library))  # type: ignore[arg-type]


def parameters(test: Any) -> Iterator[dict[str, Any]]:
    """The parameters of a test of the CUDA source, but for the way."""
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] != "way"]
    for values in itertools.product(*(mark.args[1] for mark in marks)):
        yield {mark.args[0]: value for mark, value in zip(marks, values, strict=True)}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sinkhorn_triton, "ON_CHIP", WAYS[request.param])
    monkeypatch.setattr(cuda, "WAYS", {request.param: {}})
    monkeypatch.setattr(cuda, "solve", solve)
    return request.param


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.__name__)
def test_as_the_cuda_source(test: Any, way: str) -> None:
    for options in parameters(test):
        torch.manual_seed(0)
        test(way, way=way, **options)


@pytest.mark.parametrize("shape", [(200, 5), (50, 140), (500, 2)])
def test_blocks_of_several_tiles(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinkhorn_triton, "ON_CHIP", 0)
    monkeypatch.setattr(sinkhorn_triton, "PROGRAMS", 3)
    monkeypatch.setattr(sinkhorn_triton, "TILE", 256)
    scores, weights = cosines(*shape), torch.rand(shape[0])
    for given in (None, weights):
        options = {} if given is None else {"weights": given}
        result = solve("streamed", scores, temperature=0.1, **options)
        cuda.check(result, scores, **options)
        loss, gradient = cuda.entropy(scores, cuda.balanced(scores, **options)[0], 0.1, given)
        torch.testing.assert_close(result.loss[0].double(), loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.gradient.double(), gradient, rtol=0, atol=1e-6)


def test_no_row_counts(way: str) -> None:
    scores, weights = cosines(20, 6), torch.zeros(20)
    for marginals in (None, torch.tensor([0.5, 0.5, 0, 0, 0, 0])):
        options = (marginals, weights, 0.05, 3, None, False)
        ours = sinkhorn_triton.sinkhorn_cross_entropy(scores, *options, 0.1, True)
        theirs = sinkhorn_cross_entropy_reference(scores, *options, 0.1, True)
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-6)


def test_the_operators(way: str) -> None:
    """Every operator, on strided scores, with and without codes; float64 and rows that are too wide in plain torch."""
    scores = cosines(30, 24)[:, ::2]
    options = (None, torch.rand(30), 0.05, 3, 1e-3, False)
    codes, potentials = sinkhorn_reference(scores, *options)
    out = torch.empty(30, 12)
    for found in (
        sinkhorn_triton.sinkhorn(scores, *options),
        (sinkhorn_triton.sinkhorn_codes(scores, 0.05, 3, *options[:2], 1e-3), potentials),
        (out, sinkhorn_triton.sinkhorn_out(scores, *options, out)),
        sinkhorn_triton.sinkhorn_cross_entropy(scores, *options, 0.1, True)[:1:-1],
    ):
        torch.testing.assert_close(found[0], codes, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1], potentials, rtol=1e-6, atol=1e-5)
    assert sinkhorn_triton.sinkhorn_cross_entropy(scores, *options, 0.1, False)[3].shape == (0, 12)
    wide = torch.zeros(2, sinkhorn_triton.WIDEST + 1)
    for other in (scores.double(), wide):
        assert not sinkhorn_triton.suits(other)
        given = (None, None, 0.05, 3, None, False)
        assert torch.equal(sinkhorn_triton.sinkhorn(other, *given)[0], sinkhorn_reference(other, *given)[0])
        target = torch.empty_like(other)
        sinkhorn_triton.sinkhorn_out(other, *given, target)
        assert torch.equal(target, sinkhorn_reference(other, *given)[0])
