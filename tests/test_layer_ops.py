"""The layer's steps on single rows: compiled operators and plain functions, against float64 and each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import across_instruction_sets
from torch import Tensor

from proto_reg.functional.prototypes import SIMILARITIES, prototype_scores
from proto_reg.kernels import backends, layer_ops
from proto_reg.kernels.follow import follow, follow_reference
from proto_reg.kernels.scores import scores_and_pull_back

DIMS = (1, 3, 4, 15, 16, 17, 64, 100)
operators = torch.ops.proto_reg


@pytest.fixture(autouse=True)
def loaded(cpu_library: object) -> None:
    assert backends.choose("cpu", torch.zeros(1, 1)) == "cpu"


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_unit_rows_and_their_pull_back(dim: int) -> None:
    x, gradient = torch.randn(9, dim) * 10, torch.randn(9, dim)
    x[4] = 0
    unit, inverse_norms = operators.unit_rows(x)
    expected, expected_norms = layer_ops.unit_rows_reference(x.double())
    close(unit, expected)
    close(inverse_norms, expected_norms)
    by_x = operators.unit_rows_pull_back(gradient, unit, inverse_norms)
    close(by_x, layer_ops.unit_rows_pull_back_reference(gradient.double(), expected, expected_norms))
    assert torch.equal(by_x[4], gradient[4])
    leaf = x.double().requires_grad_()
    layer_ops.unit_rows_reference(leaf)[0].backward(gradient.double())
    others = torch.arange(9) != 4
    close(by_x[others], leaf.grad[others])


@pytest.mark.parametrize("dim", DIMS)
def test_balance(dim: int) -> None:
    a, b = torch.randn(7, dim) * 1e-6, torch.randn(7, dim) * 1e6
    direction, scale = operators.balance(a, b, 0.3, 0.0)
    close(direction.norm(), torch.tensor(0.3))
    close(scale * a.norm(), torch.tensor(0.3))
    close(operators.balance(a, b, 0.3, 0.2)[0], layer_ops.balance_reference(a.double(), b.double(), 0.3, 0.2)[0])
    nothing, scale = operators.balance(torch.zeros_like(a), torch.zeros_like(a), 0.3, 0.2)
    assert not nothing.any()
    assert scale == 0


@pytest.mark.parametrize("dim", DIMS)
def test_typical_sums_leave_out_what_is_not_finite_or_not_counted(dim: int) -> None:
    x, index, counted, v = torch.randn(50, dim), torch.randint(6, (50,)), torch.rand(50) < 0.7, torch.randn(6, dim)
    x[3, -1], x[8, 0], x[9, dim // 2] = math.nan, math.inf, -math.inf
    for mask in (None, counted, torch.tensor(True), torch.tensor(False), counted.repeat_interleave(2)[::2]):
        close(
            operators.typical_sums(x, index, mask, v, 0.7),
            layer_ops.typical_sums_reference(x.double(), index, mask, v.double(), 0.7),
        )


@pytest.mark.parametrize("dim", DIMS)
def test_tally_adds_up_what_is_finite_and_counted(dim: int) -> None:
    x, scores, v = torch.randn(50, dim), torch.randn(50, 7).round(), torch.randn(7, dim)  # the first equal score wins
    x[3, -1], x[8, 0], x[9, dim // 2] = math.nan, math.inf, -math.inf
    losses = torch.tensor(0.5), torch.tensor(-0.25)
    for mask in (None, torch.rand(50) < 0.7):
        counts, totals = torch.arange(7), torch.tensor([1.0, 2.0, 3.0, 4.0])
        expected = counts.clone(), totals.clone()
        for _ in range(2):
            operators.tally_float32(counts, totals, x, scores, v, mask, *losses)
            layer_ops.tally_reference(*expected, x.double(), scores.double(), v.double(), mask, *losses)
        assert torch.equal(counts, expected[0])
        close(totals, expected[1])
        assert totals[2] == 5


@pytest.mark.parametrize("dim", DIMS)
def test_follow(dim: int) -> None:
    v, sums, counts = torch.randn(5, dim), torch.randn(5, dim), torch.tensor([0.0, 3.0, 1.0, 0.0, 7.0])
    for seen in (v + 1, v.clone()):  # the prototypes have moved, or not
        state = [x.clone() for x in (v, sums, counts, seen)]
        expected = [x.double() for x in state]
        with torch.no_grad():
            follow(*state, 0.02)
            follow_reference(*expected, 0.02)
        for ours, theirs in zip(state, expected, strict=True):
            close(ours, theirs)
        assert torch.equal(state[0][0], v[0])


@pytest.mark.parametrize("form", [follow, follow_reference])
def test_latents_too_far_to_weigh_anything_move_nothing(form: Callable[..., None]) -> None:
    """If the whole weight is 1e-42, its inverse is infinite."""
    v = torch.randn(2, 8)
    state = [v.clone(), torch.full((2, 8), 1e-30), torch.tensor([1e-42, 0.5]), v + 1]
    with torch.no_grad():
        form(*state, 0.02)
    assert torch.equal(state[0][0], v[0])
    close(state[0][1], 0.98 * v[1])


def test_they_are_taken_where_they_can_be_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 5)
    assert not layer_ops.compiled(x)  # autograd needs a graph
    with torch.no_grad():
        assert layer_ops.compiled(x)
        assert not layer_ops.compiled(x.double())
        assert not layer_ops.compiled(x.bfloat16())
        assert not layer_ops.compiled(x.to("meta"))
        monkeypatch.setenv("PROTO_REG_BACKEND", "torch")
        backends._reset()
        try:
            assert not layer_ops.compiled(x)
        finally:
            monkeypatch.undo()
            backends._reset()


def test_non_contiguous_rows() -> None:
    x = torch.randn(20, 9).T
    index = torch.randint(3, (9,))
    with torch.no_grad():
        for ours, plain in (
            (layer_ops.unit_rows(x)[0], layer_ops.unit_rows_reference(x)[0]),
            (layer_ops.balance(x, x.flip(0), 1.0, 2.0)[0], layer_ops.balance_reference(x, x.flip(0), 1.0, 2.0)[0]),
            (
                layer_ops.typical_sums(x, index, torch.tensor(True), x[:3].T.contiguous().T),
                layer_ops.typical_sums_reference(x, index, torch.tensor(True), x[:3]),
            ),
        ):
            close(ours, plain)
    v, sums, counts, seen = (torch.randn(6, 4).T.contiguous().T for _ in range(4))
    with torch.no_grad():
        follow(v, sums, counts[:, 0].abs(), seen, 0.1)
    assert torch.equal(v, seen)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_pull_back_is_that_of_autograd(similarity: str) -> None:
    z, v, by_scores = torch.randn(30, 12), torch.randn(7, 12), torch.randn(30, 7)
    found, pull_back = scores_and_pull_back(z, v, similarity)
    wide = [x.double().requires_grad_() for x in (z, v)]
    expected = prototype_scores(*wide, similarity)
    close(found, expected.detach())
    for ours, theirs in zip(pull_back(by_scores), torch.autograd.grad(expected, wide, by_scores.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    x, index = torch.randn(6, 5), torch.randint(3, (6,))
    unit, inverse_norms = operators.unit_rows(x)
    torch.library.opcheck(operators.unit_rows.default, (x,))
    torch.library.opcheck(operators.unit_rows_pull_back.default, (x, unit, inverse_norms))
    torch.library.opcheck(operators.balance.default, (x, unit, 0.1, 0.2))
    torch.library.opcheck(operators.typical_sums.default, (x, index, torch.tensor(True), unit[:3], 1.0))
    tallied = (torch.zeros(3, dtype=torch.int64), torch.zeros(4), x, torch.randn(6, 3), torch.randn(3, 5), None)
    torch.library.opcheck(operators.tally_float32.default, (*tallied, torch.tensor(1.0), torch.tensor(2.0)))
    state = (torch.randn(3, 5), torch.randn(3, 5), torch.ones(3), torch.randn(3, 5), 0.1)
    torch.library.opcheck(operators.follow_float32.default, state)


BY_ISA = """
import sys, torch
from proto_reg.kernels import backends
torch.manual_seed(0)
assert backends.choose("cpu", torch.zeros(1, 1)) == "cpu"
operators, results = torch.ops.proto_reg, []
for dim in (1, 3, 8, 17, 100):
    x, y, index = torch.randn(12, dim), torch.randn(12, dim), torch.randint(3, (12,))
    unit, inverse_norms = operators.unit_rows(x)
    results += [unit, inverse_norms, operators.unit_rows_pull_back(y, unit, inverse_norms)]
    results += [*operators.balance(x, y, 0.1, 0.2), operators.typical_sums(x, index, torch.tensor(True), y[:3], 1.0)]
torch.save(results, sys.argv[1])
"""


@pytest.mark.slow
def test_instruction_sets_agree(tmp_path: Path) -> None:
    for a, b in across_instruction_sets(BY_ISA, tmp_path):
        close(a, b)
