"""The Triton kernels in Triton's interpreter, against float64. test_triton.py runs this file with TRITON_INTERPRET=1.

The tables and the checks are those of the CUDA source (test_cuda_source.py), and for gradients those of the CPU kernel
(test_sinkhorn_reverse.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import test_cuda_source as cuda
import test_sinkhorn_reverse as reverse
import torch
from conftest import cosines
from emulation.emulator import Result
from torch import Tensor

from proto_reg.kernels import backends, sinkhorn_triton, sinkhorn_triton_gradient
from proto_reg.kernels.sinkhorn_gradient import sinkhorn_gradient_reference
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


@pytest.fixture
def behind_the_operators(way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These kernels compute tensors on the CPU, too."""
    monkeypatch.setattr(backends, "choose", lambda *_: "triton")
    library = torch.library.Library("proto_reg", "IMPL", "CPU")
    for name, function in {**sinkhorn_triton.OPERATORS, **sinkhorn_triton_gradient.OPERATORS}.items():
        library.impl(name, torch.no_grad()(function))
    yield
    library._destroy()


# Shape, factor of the scores, epsilon, iterations and tol.
GRADIENTS = {
    "one iteration": ((2, 20, 7), 1, 0.3, 1, None),
    "groups": ((2, 20, 17), 1, 0.1, 5, None),
    "one matrix": ((33, 65), 1, 0.3, 3, None),
    "one column": ((9, 1), 1, 0.3, 2, None),
    "one row": ((1, 9), 1, 0.3, 2, None),
    "a wide span": ((2, 20, 7), 2000, 1.0, 6, None),
    "tol": ((3, 20, 4), torch.tensor([0.1, 0.4, 1.5])[:, None, None], 0.3, 9, 1e-2),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(case: str, behind_the_operators: None) -> None:
    torch.manual_seed(0)
    shape, factor, epsilon, num_iters, tol = GRADIENTS[case]
    scores, options, by = reverse.problem(shape)
    scores = factor * scores
    left_out = torch.where(options["marginals"].unsqueeze(-2) == 0, 1e5, scores)
    for x, given in ((scores, {"tol": tol}), (left_out, options | {"tol": tol})):
        arguments = x, given, epsilon, num_iters, by
        reverse.close(reverse.ours(*arguments), reverse.autograd(*arguments), 1e-5)


def test_gradients_of_special_scores(behind_the_operators: None) -> None:
    reverse.test_scores_of_minus_infinity_have_a_gradient_of_0((2, 9, 5), "triton")
    reverse.test_nan_policies("triton")


def test_gradients_by_blocks_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ON_CHIP": 0, "PROGRAMS": 3, "TILE": 256}.items():
        monkeypatch.setattr(sinkhorn_triton, name, value)
    scores, options, by = reverse.problem((100, 5))
    tensors = scores, options["marginals"], options["weights"]
    found = sinkhorn_triton_gradient.sinkhorn_gradient(*tensors, 0.3, 3, None, *by)
    wanted = sinkhorn_gradient_reference(*(x.double() for x in tensors), 0.3, 3, None, *(x.double() for x in by))
    reverse.close(list(found), list(wanted), 1e-5)


def test_gradients_where_no_row_counts_and_where_plain_torch_computes(way: str) -> None:
    """Also in float64, and of rows that are too wide."""
    scores, by = cosines(20, 6), torch.randn(20, 6)
    none = (torch.tensor([0.5, 0.5, 0, 0, 0, 0]), torch.zeros(20), 0.3, 3, None, by, torch.randn(6))
    wide = torch.zeros(2, sinkhorn_triton.WIDEST + 1)
    rest = (None, None, 0.3, 3, None)
    for arguments in ((scores, *none), (scores.double(), *rest, by.double(), None), (wide, *rest, wide, None)):
        found = sinkhorn_triton_gradient.sinkhorn_gradient(*arguments)
        for x, y in zip(found, sinkhorn_gradient_reference(*arguments), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
