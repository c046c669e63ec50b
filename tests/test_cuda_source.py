"""The CUDA source without a GPU: an emulation runs every regime, and the tests compare it with float64."""

from __future__ import annotations

import ctypes
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import balanced, cosines
from emulation.emulator import Limits, Result, compile_emulation, device, emulation_key, solve
from torch import Tensor

pytestmark = pytest.mark.slow

# The ways to compute. A test forces them on any shape: the planner's first regime, and how it may stream.
WAYS = {
    "registers": {"allow": 0},
    "block": {"allow": 1},
    "cluster": {"allow": 2},
    "grid": {"allow": 3},
    "narrow": {"allow": 4, "fuse": 2},
    "fused": {"allow": 4, "fuse": 1},
    "sweeps": {"allow": 4, "fuse": 0},
}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # a bit over half an ulp of a code near 1


@pytest.fixture(scope="session")
def built() -> None:
    """These tests do not wait for the CPU kernels. Another worker may compile them at the same time."""


@pytest.fixture(scope="session")
def library(kept: Callable[[str, str], Path]) -> ctypes.CDLL:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("the emulation needs a C++ compiler")
    return compile_emulation(kept("emulation", emulation_key()))


def entropy(scores: Tensor, codes: Tensor, temperature: float, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64."""
    x = scores.double().requires_grad_()
    w = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    rows = (x / temperature).logsumexp(1) - torch.where(codes > 0, codes * x / temperature, 0.0).sum(1)
    loss = (w * rows).sum() / w.sum()
    loss.backward()
    return loss.detach(), x.grad


def check(result: Result, scores: Tensor, tolerance: float | None = None, **options) -> None:
    codes, potentials = balanced(scores, **options)
    tolerance = TOLERANCE[scores.dtype] if tolerance is None else tolerance
    assert result.codes.dtype == scores.dtype
    torch.testing.assert_close(result.codes.double(), codes, rtol=0, atol=tolerance)
    torch.testing.assert_close(result.potentials.double(), potentials, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(13, 6), (37, 30), (50, 16), (9, 300), (5, 1), (2, 1200), (130, 3)])
@pytest.mark.parametrize("way", WAYS)
def test_ragged_shapes(library, way: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    scores = cosines(*shape).to(dtype)
    result = solve(library, scores, temperature=0.1, **WAYS[way])
    assert result.plan.name == (way if way != "registers" or shape[1] <= 12 * 32 else "block")
    check(result, scores)
    loss, gradient = entropy(scores, balanced(scores)[0], 0.1)
    torch.testing.assert_close(result.loss[0].double(), loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(
        result.gradient.double(), gradient, rtol=0, atol=2 * TOLERANCE[dtype] / 0.1 / shape[0] + 1e-7
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_iters", [1, 2, 20])
def test_iterations(library, way: str, num_iters: int) -> None:
    scores = cosines(40, 12)
    check(solve(library, scores, num_iters=num_iters, **WAYS[way]), scores, num_iters=num_iters)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 300)])
def test_one_row(library, shape: tuple[int, int]) -> None:
    scores = cosines(*shape)
    for way in ("registers", "block", "narrow", "fused", "sweeps"):
        check(solve(library, scores, **WAYS[way]), scores)


@pytest.mark.parametrize("way", WAYS)
def test_a_single_prototype(library, way: str) -> None:
    result = solve(library, torch.randn(50, 1), temperature=0.1, **WAYS[way])
    assert (result.codes == 1).all()
    assert not result.gradient.any()
    assert result.loss[0] == 0


def adversarial_scores() -> dict[str, Tensor]:
    """Scores that are not normalised, that are shifted, that have outlying rows and columns, or that are degenerate."""
    cases = {
        "dots up to 300": (100 * torch.randn(64, 14)).clamp(-300, 300),
        "float16 dots": (100 * torch.randn(64, 14)).clamp(-300, 300).half(),
        "cosine + 10": cosines(64, 14) + 10,
        "a column at -200": cosines(64, 14),
        "a row at -200": cosines(64, 14),
        "a column at 200": cosines(64, 14),
        "a row at 200": cosines(64, 14),
        "float16": (0.9 * cosines(64, 14)).half(),
        "a column at -inf": cosines(64, 14),
        "far rows and columns": cosines(64, 14) + 1e4 * torch.randn(64, 1) + 1e4 * torch.randn(14),
    }
    cases["a column at -200"][:, 3] -= 200
    cases["a row at -200"][3] -= 200
    cases["a column at 200"][:, 3] += 200
    cases["a row at 200"][3] += 200
    cases["a column at -inf"][:, 3] = -math.inf
    return cases


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", adversarial_scores())
def test_robustness_columns(library, way: str, case: str) -> None:
    scores = adversarial_scores()[case]
    result = solve(library, scores, **WAYS[way])
    check(result, scores)
    assert (result.codes.double().sum(1) - 1).abs().max() < max(1e-6, TOLERANCE[scores.dtype])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_largest_finite_scores(library, way: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for signs in (torch.randn(64, 8).sign(), -torch.ones(64, 8), torch.eye(8), torch.rand(33, 5) - 0.5):
        scores = (signs.double() * largest).to(dtype)
        scores[0] = -largest
        weights = torch.ones(len(scores))
        weights[1] = 0
        result = solve(library, scores, weights=weights, **WAYS[way])
        assert result.codes.isfinite().all()
        assert (result.codes.double().sum(1) - 1).abs().max() < 4e-3
    scores = torch.zeros(3, 3, dtype=dtype)
    scores[0] = torch.tensor([-1.0, -0.3, -0.6]) * largest
    assert solve(library, scores, **WAYS[way]).codes[0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("way", WAYS)
def test_many_iterations_over_a_wide_range(library, way: str) -> None:
    """The scaling vectors go beyond 2^40. The resident kernels then compute their exponentials anew."""
    scores = (20 * torch.randn(24, 7)).clamp(-60, 60)
    options = {"epsilon": 0.5, "num_iters": 60}
    check(solve(library, scores, **options, **WAYS[way]), scores, 1e-4, **options)


@pytest.mark.parametrize("way", WAYS)
def test_marginals(library, way: str) -> None:
    scores = cosines(60, 5)
    for shares in ([0.5, 0.3, 0.15, 0.05, 0.0], [0.7, 0.3 - 1e-12, 1e-12, 0.0, 0.0]):
        marginals = torch.tensor(shares)
        result = solve(library, scores, marginals=marginals, temperature=0.2, **WAYS[way])
        check(result, scores, marginals=marginals)
        assert not result.codes[:, marginals == 0].any()
        loss, gradient = entropy(scores, balanced(scores, marginals=marginals)[0], 0.2)
        torch.testing.assert_close(result.loss[0].double(), loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.gradient.double(), gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights(library, way: str, bad: float) -> None:
    """A weight of 0 leaves a row out, with any content. A weight of 2 counts the row twice."""
    scores = cosines(41, 9)
    weights = torch.rand(41) * 2
    weights[::5], weights[1] = 0, 1e-3
    result = solve(library, scores, weights=weights, temperature=0.1, **WAYS[way])
    check(result, scores, weights=weights)
    loss, gradient = entropy(scores, balanced(scores, weights=weights)[0], 0.1, weights)
    torch.testing.assert_close(result.loss[0].double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.gradient.double(), gradient, rtol=0, atol=1e-6)
    assert not result.gradient[::5].any()

    spoilt = scores.clone()
    spoilt[5, 2], spoilt[10] = bad, -math.inf
    others = solve(library, spoilt, weights=weights, temperature=0.1, **WAYS[way])
    kept = torch.ones(41, dtype=torch.bool)
    kept[[5, 10]] = False
    # With a NaN, the kernel does not know that the range is narrow. It then computes with another pass.
    exact = 0 if way != "narrow" else 1e-6
    torch.testing.assert_close(others.codes[kept], result.codes[kept], rtol=0, atol=exact)
    torch.testing.assert_close(others.loss, result.loss, rtol=0, atol=exact)
    assert others.codes[~kept].isnan().all()
    assert not others.gradient[~kept].any()

    twice = torch.ones(41)
    twice[7] = 2
    repeated = torch.cat([scores, scores[7:8]])
    result = solve(library, scores, weights=twice, **WAYS[way])
    torch.testing.assert_close(result.codes.double(), balanced(repeated)[0][:41], rtol=0, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_no_row_counts(library, way: str) -> None:
    scores = cosines(20, 6)
    marginals = torch.tensor([0.5, 0.5, 0, 0, 0, 0])
    result = solve(library, scores, weights=torch.zeros(20), marginals=marginals, temperature=0.1, **WAYS[way])
    torch.testing.assert_close(result.codes, (scores / 0.05).softmax(1), rtol=0, atol=2e-6)
    assert not result.potentials.any()
    assert not result.loss.any()
    assert not result.gradient.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", ["nan", "inf", "row of -inf"])
def test_nan_policies(library, way: str, bad: str) -> None:
    scores = cosines(33, 6)
    if bad == "row of -inf":
        scores[3] = -math.inf
    else:
        scores[3, 2] = float(bad)
    assert solve(library, scores, **WAYS[way]).codes.isnan().all()
    others = torch.arange(33) != 3
    result = solve(library, scores, isolate=True, temperature=0.1, **WAYS[way])
    assert result.codes[3].isnan().all()
    assert not result.gradient[3].any()
    check(Result(result.codes[others], result.potentials, *([None] * 3)), scores[others])
    loss, gradient = entropy(scores[others], balanced(scores[others])[0], 0.1)
    torch.testing.assert_close(result.loss[0].double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.gradient[others].double(), gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_tol(library, way: str) -> None:
    scores = cosines(64, 9)
    result = solve(library, scores, num_iters=200, tol=1e-2, **WAYS[way])
    balance = result.codes.mean(0) * 9
    assert 1e-5 < (balance - 1).abs().max() < 1e-2
    errors = [(balanced(scores, num_iters=n)[0].mean(0) * 9 - 1).abs().max() for n in range(1, 30)]
    stopped = next(n for n, error in enumerate(errors, 1) if error <= 1e-2)
    check(result, scores, num_iters=stopped)
    check(solve(library, scores, tol=1e-9, **WAYS[way]), scores)


@pytest.mark.parametrize("way", WAYS)
def test_a_column_that_gets_nothing_saves_no_row(library, way: str) -> None:
    """With isolate=True: row 3 has only one finite score, and its column has the marginal 0."""
    scores, marginals = cosines(33, 6), torch.tensor([0.0, 0.2, 0.2, 0.2, 0.2, 0.2])
    scores[3, 1:] = -math.inf
    others = torch.arange(33) != 3
    result = solve(library, scores, isolate=True, marginals=marginals, **WAYS[way])
    assert result.codes[3].isnan().all()
    check(Result(result.codes[others], result.potentials, *([None] * 3)), scores[others], marginals=marginals)


@pytest.mark.parametrize("way", WAYS)
def test_tol_where_a_column_has_no_mass(library, way: str) -> None:
    """The other columns share its mass. They settle in as many iterations as without this column."""
    scores = cosines(64, 9)
    without = solve(library, scores, num_iters=200, tol=1e-2, **WAYS[way])
    more = torch.cat([scores, torch.full((64, 1), -math.inf)], 1)
    result = solve(library, more, num_iters=200, tol=1e-2, **WAYS[way])
    torch.testing.assert_close(result.codes[:, :9], without.codes, rtol=0, atol=2e-6)
    assert not result.codes[:, 9].any()


@pytest.mark.parametrize("way", WAYS)
def test_groups(library, way: str) -> None:
    scores = cosines(3 * 20, 6).view(3, 20, 6)
    marginals, weights = torch.rand(3, 6).softmax(1), torch.rand(3, 20)
    result = solve(library, scores, marginals=marginals, weights=weights, **WAYS[way])
    for group in range(3):
        mine = Result(result.codes[group], result.potentials[group], *([None] * 3))
        check(mine, scores[group], marginals=marginals[group], weights=weights[group])


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_threads_does_not_matter(library, way: str) -> None:
    scores = cosines(37, 30)
    weights = torch.rand(37)
    runs = [
        solve(library, scores, weights=weights, temperature=0.1, tol=1e-3, num_iters=4, order=order, **WAYS[way])
        for order in range(6)
    ]
    for run in runs[1:]:
        for name in ("codes", "potentials", "loss", "gradient"):
            assert torch.equal(getattr(run, name), getattr(runs[0], name)), name


@pytest.mark.parametrize("way", WAYS)
def test_more_rows_than_one_round_of_blocks_takes(library, way: str) -> None:
    for scores, order in ((cosines(700, 5), 0), (cosines(700, 5), 3), (cosines(140, 140), 3), (cosines(140, 140), 5)):
        limits = device(1 if way in ("narrow", "fused", "sweeps") else 4)
        result = solve(library, scores, temperature=0.1, limits=limits, order=order, **WAYS[way])
        check(result, scores)
        loss, _ = entropy(scores, result.codes.double(), 0.1)
        torch.testing.assert_close(result.loss[0].double(), loss, rtol=1e-6, atol=1e-6)
        usable = torch.rand(len(scores)) > 0.5
        scores[~usable] = math.nan
        result = solve(library, scores, isolate=True, limits=limits, order=order, **WAYS[way])
        check(Result(result.codes[usable], result.potentials, *([None] * 3)), scores[usable])


def test_rows_shared_by_a_cluster(library) -> None:
    """Rows are long and the device has little shared memory. The fused pass splits them, with or without vectors."""
    limits = device(shared=10)
    for columns in (1200, 1203):
        scores = cosines(11, columns)
        runs = [solve(library, scores, num_iters=4, allow=4, fuse=1, limits=limits, order=order) for order in range(6)]
        assert runs[0].plan.cluster > 1
        check(runs[0], scores, num_iters=4)
        assert all(torch.equal(run.codes, runs[0].codes) for run in runs)
    scores[3, 7] = math.nan
    result = solve(library, scores, isolate=True, allow=4, fuse=1, limits=limits)
    others = torch.arange(11) != 3
    assert result.codes[3].isnan().all()
    check(Result(result.codes[others], result.potentials, *([None] * 3)), scores[others])


def test_the_launcher_takes_what_the_device_grants(library) -> None:
    """Without clusters and cooperative launches it streams, and no block waits for another one."""
    scores = cosines(300, 100)
    names = []
    for clusters, cooperative, shared in ((True, True, 48), (False, True, 48), (False, False, 48), (True, True, 1024)):
        limits: Limits = device(8, 64, shared, clusters, cooperative)
        result = solve(library, scores, limits=limits, allow=None)
        names.append(result.plan.name)
        check(result, scores)
    assert names == ["cluster", "grid", "narrow", "cluster"]


def test_registers_of_one_block_of_a_cluster_and_of_a_grid(library) -> None:
    """The launcher takes the smallest of them that leaves few rows for each thread.

    On a device without clusters it takes one block or none.
    """
    found = {}
    for rows in (20, 60, 200, 700):
        scores = cosines(rows, 5)
        for clusters in (True, False):
            limits = device(32, 64, clusters=clusters)
            result = solve(library, scores, temperature=0.1, limits=limits, order=3)
            found[rows, clusters] = (result.plan.name, result.plan.blocks, result.plan.cluster)
            check(result, scores)
    assert found[20, True] == ("registers", 1, 1)
    assert found[60, True] == ("registers", 2, 2)
    assert found[200, True] == ("registers", 8, 8)
    assert found[700, True][::2] == ("registers", 8) and found[700, True][1] > 8
    assert found[60, False] == ("registers", 1, 1)
    assert found[700, False][0] == "block"


def test_rows_over_a_cluster_of_a_narrow_range(library) -> None:
    scores = cosines(11, 1203)
    runs = [solve(library, scores, temperature=0.1, num_iters=4, allow=4, order=order) for order in range(6)]
    assert runs[0].plan.narrow_cluster > 1
    check(runs[0], scores, num_iters=4)
    loss, gradient = entropy(scores, balanced(scores, num_iters=4)[0], 0.1)
    torch.testing.assert_close(runs[0].loss[0].double(), loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(runs[0].gradient.double(), gradient, rtol=0, atol=2e-6)
    assert all(torch.equal(run.codes, runs[0].codes) for run in runs)


def test_code_for_an_older_architecture_asks_for_no_cluster(library) -> None:
    """PTX of 8.0 runs on a device of 9.0. Its kernels have no code for clusters."""
    scores = cosines(300, 100)
    for version, expected in ((90, "cluster"), (80, "grid")):
        library.pretend_ptx(version)
        try:
            result = solve(library, scores, limits=device(8, 64), allow=None)
        finally:
            library.pretend_ptx(90)
        assert result.plan.name == expected
        assert result.plan.narrow_cluster <= 1
        check(result, scores)


def test_a_refused_grid_is_planned_again(library) -> None:
    """Occupancy says that the grid fits, and the launch is refused: another process holds a part of the device."""
    scores, limits = cosines(300, 100), device(8, 64, clusters=False)
    names = []
    for granted in (True, False):
        library.grant_grids(granted)
        try:
            result = solve(library, scores, limits=limits, allow=None)
        finally:
            library.grant_grids(True)
        names.append(result.plan.name)
        check(result, scores)
    assert names == ["grid", "narrow"]


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("way", ["narrow", "fused", "sweeps"])
def test_tol_of_many_columns(library, way: str, empty: bool) -> None:
    """Several blocks decide. A column without mass leaves its share to the others."""
    scores = cosines(40, 700)
    if empty:
        scores[:, 5] = -math.inf
    runs = [solve(library, scores, num_iters=200, tol=1e-3, order=order, **WAYS[way]) for order in range(4)]
    sums = runs[0].codes.double().sum(0)
    kept = torch.arange(700) != 5 if empty else torch.ones(700, dtype=torch.bool)
    assert (sums[kept] / sums[kept].mean() - 1).abs().max() < 2e-3
    assert all(torch.equal(run.codes, runs[0].codes) for run in runs)
    longer = solve(library, scores, num_iters=400, tol=1e-3, **WAYS[way])
    assert torch.equal(longer.codes, runs[0].codes)  # it had stopped
