"""The Sinkhorn operator: the iterate, robustness and options."""

from __future__ import annotations

import math
import re

import pytest
import torch
from conftest import cosines, log_sinkhorn, swav_sinkhorn
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_reg import PrototypeWarning, PrototypicalRegularizer, SinkhornAssigner
from proto_reg.functional import sinkhorn

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("num_iters", [1, 2, 3, 10])
@pytest.mark.parametrize("shape", [(256, 30), (7, 30), (1, 5), (5, 1), (1, 1)])
def test_is_swavs_iterate_in_float64(shape: tuple[int, int], num_iters: int) -> None:
    scores = cosines(*shape, dtype=torch.float64)
    codes = sinkhorn(scores, 0.05, num_iters)
    torch.testing.assert_close(codes, swav_sinkhorn(scores, 0.05, num_iters), rtol=0, atol=1e-12)


def adversarial_scores() -> dict[str, torch.Tensor]:
    """The hard scores of the robustness table.

    They are not normalised, are shifted, have outlying rows and columns, are in half precision, or are degenerate.
    """
    cases = {
        "dots up to 300": (100 * torch.randn(256, 30)).clamp(-300, 300),
        "cosine + 10": cosines(256, 30) + 10,
        "a column at -200": cosines(256, 30),
        "a row at -200": cosines(256, 30),
        "float16": (0.9 * cosines(256, 30)).half(),
        "float16 dots": (100 * torch.randn(256, 30)).clamp(-300, 300).half(),
        "bfloat16": cosines(256, 30).bfloat16(),
        "B = 1": torch.randn(1, 30),
        "K = 1": torch.randn(256, 1),
        "a column at -inf": cosines(256, 30),
    }
    cases["a column at -200"][:, 3] = -200
    cases["a row at -200"][3] = -200
    cases["a column at -inf"][:, 3] = -math.inf
    return cases


@pytest.mark.parametrize("case", adversarial_scores())
def test_robustness_columns(case: str) -> None:
    scores = adversarial_scores()[case]
    codes = sinkhorn(scores)
    tolerance = 5e-3 if scores.dtype in (torch.float16, torch.bfloat16) else 1e-3
    assert codes.dtype == scores.dtype
    assert codes.isfinite().all()
    assert (codes.double().sum(1) - 1).abs().max() < tolerance
    assert (codes.double() - log_sinkhorn(scores, 0.05, 3)).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_finite_scores(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for signs in (torch.randn(64, 8).sign(), -torch.ones(64, 8), torch.eye(8)):
        scores = signs.to(dtype) * largest
        scores[0] = -largest
        codes = sinkhorn(scores)
        assert codes.isfinite().all()
        torch.testing.assert_close(codes.double().sum(1), torch.ones(len(codes)).double(), rtol=0, atol=5e-3)


def test_extreme_rows_keep_their_differences() -> None:
    scores = torch.zeros(3, 3)
    scores[0] = torch.tensor([-3e38, -1e38, -2e38])
    assert sinkhorn(scores)[0].tolist() == [0, 1, 0]
    scores[0] = 3e38
    assert sinkhorn(scores, mask=torch.tensor([False, True, True])).isfinite().all()
    assert sinkhorn(scores, mask=torch.zeros(3, dtype=torch.bool)).isfinite().all()


def test_a_column_of_minus_infinity_gets_nothing_and_harms_nobody() -> None:
    scores = cosines(64, 6)
    codes = sinkhorn(torch.cat([scores, torch.full((64, 1), -math.inf)], 1))
    assert not codes[:, 6].any()
    torch.testing.assert_close(codes[:, :6], sinkhorn(scores))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    scale=st.floats(1e-3, 1e4),
    offset=st.floats(-1e4, 1e4),
    num_iters=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_rows_sum_to_one_for_any_finite_scores(rows, columns, scale, offset, num_iters, dtype, seed) -> None:
    torch.manual_seed(seed)
    codes = sinkhorn((torch.randn(rows, columns) * scale + offset).to(dtype), 0.05, num_iters)
    assert codes.isfinite().all()
    assert (codes.double().sum(1) - 1).abs().max() < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_marginals_are_met_and_zero_gets_nothing() -> None:
    scores = cosines(200, 5)
    marginals = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    codes = sinkhorn(scores, 0.05, 500, marginals=marginals)
    torch.testing.assert_close(codes.mean(0), marginals, rtol=1e-3, atol=1e-6)
    assert not codes[:, 4].any()
    few = sinkhorn(scores, 0.05, 3, marginals=marginals)
    torch.testing.assert_close(few.double(), log_sinkhorn(scores, 0.05, 3, marginals), rtol=0, atol=1e-5)
    torch.testing.assert_close(few, sinkhorn(scores, 0.05, 3, marginals=marginals.tolist()))


def test_tol_stops_once_columns_are_balanced() -> None:
    scores = cosines(256, 30)
    codes = sinkhorn(scores, 0.05, 1000, tol=1e-3)
    assert (codes.mean(0) * 30 - 1).abs().max() < 1e-3
    assert (codes - sinkhorn(scores, 0.05, 1000)).abs().max() > 1e-7
    torch.testing.assert_close(sinkhorn(scores, 0.05, 3, tol=1e-5), sinkhorn(scores, 0.05, 3))


FOREVER = 10**9


def tolerances() -> dict[str, tuple[torch.Tensor, dict]]:
    """Problems for the kernels. Each one takes another path through them."""
    shares = torch.rand(60).softmax(0)
    groups = torch.stack([cosines(64, 8) for _ in range(3)])
    return {
        "small": (cosines(64, 8), {}),
        "narrow": (cosines(300, 5), {}),
        "long": (cosines(500, 60), {}),
        "with shares": (cosines(500, 60), {"marginals": shares}),
        "with weights": (cosines(500, 60), {"weights": torch.rand(500)}),
        "without a prototype": (cosines(500, 60), {"prototype_mask": torch.arange(60) > 3}),
        "many prototypes": (cosines(64, 20_000) / 4, {}),
        "large scores": (10 * cosines(64, 8), {}),
        "far apart": (cosines(64, 8) + 100 * torch.arange(8), {}),
        "half precision": (cosines(500, 60).bfloat16(), {}),
        "groups": (groups, {"marginals": [0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2]}),
        "a column of -inf": (cosines(64, 8).index_fill(1, torch.tensor([3]), -math.inf), {}),
    }


@pytest.mark.parametrize("case", tolerances())
@pytest.mark.filterwarnings("ignore:tol. .* of scores so large:proto_reg.PrototypeWarning")
def test_a_tol_that_float32_cannot_reach_ends_and_says_so(case: str) -> None:
    scores, options = tolerances()[case]
    with pytest.warns(PrototypeWarning, match="tol: 1e-09 is less than float32 can tell"):
        codes = sinkhorn(scores, 0.05, FOREVER, tol=1e-9, **options)
    wide = sinkhorn(scores.double(), 0.05, FOREVER, tol=1e-6, **options)
    close = {torch.float32: 2e-5, torch.bfloat16: 5e-3}[scores.dtype]
    torch.testing.assert_close(codes.double(), wide, rtol=0, atol=close)
    least = 16 * torch.finfo(torch.float32).eps
    again = sinkhorn(scores, 0.05, FOREVER, tol=max(least, scores.shape[-1] / 2e9), **options)
    assert torch.equal(again, codes)


def test_float64_has_a_least_tol_too() -> None:
    scores = cosines(64, 8, torch.float64)
    with pytest.warns(PrototypeWarning, match="tol: 1e-30 is less than float64 can tell"):
        codes = sinkhorn(scores, 0.05, FOREVER, tol=1e-30)
    torch.testing.assert_close(codes.mean(0), torch.full((8,), 1 / 8, dtype=torch.float64), rtol=1e-13, atol=0)
    sinkhorn(scores, 0.05, FOREVER, tol=1e-13)


def test_plain_torch_says_at_which_error_it_ends() -> None:
    scores = 20 * cosines(64, 3)
    with pytest.warns(PrototypeWarning, match="tol: 2e-06 is less than float32 can tell of scores so large") as record:
        codes = sinkhorn(scores, 0.05, FOREVER, tol=2e-6, backend="torch")
    error = (codes.double().mean(0) * 3 - 1).abs().max().item()
    reached = float(re.search(r"error of (\S+)\.", str(record[0].message)).group(1))
    assert reached == pytest.approx(error, rel=0.2)
    assert 2e-6 < reached < 5e-5


def test_tol_through_the_iterations() -> None:
    scores = cosines(64, 8, torch.float64).requires_grad_()
    codes = sinkhorn(scores, 0.3, FOREVER, tol=1e-12, differentiable=True)
    codes[:, 0].square().sum().backward()
    once = scores.grad.clone()
    scores.grad = None
    sinkhorn(scores, 0.3, 200, differentiable=True)[:, 0].square().sum().backward()
    torch.testing.assert_close(once, scores.grad, rtol=1e-9, atol=1e-12)


def test_the_layers_step_knows_the_least_tol() -> None:
    layer = PrototypicalRegularizer(8, 4, assigner=SinkhornAssigner(0.5, FOREVER, tol=1e-12))
    z = torch.randn(64, 8, requires_grad=True)
    with pytest.warns(PrototypeWarning, match="tol: 1e-12 is less than float32 can tell"):
        _, info = layer(z)
    torch.testing.assert_close(info.codes.mean(0), torch.full((4,), 0.25), rtol=1e-5, atol=0)


def test_mask_takes_rows_out_of_the_balance() -> None:
    scores = cosines(100, 8)
    mask = torch.rand(100) > 0.4
    codes = sinkhorn(scores, mask=mask)
    torch.testing.assert_close(codes[mask], sinkhorn(scores[mask]))
    torch.testing.assert_close(codes.sum(1), torch.ones(100))


def test_potentials_assign_new_rows_by_the_same_balance() -> None:
    scores = adversarial_scores()["dots up to 300"].double()
    codes, potentials = sinkhorn(scores, return_potentials=True)
    torch.testing.assert_close((scores / 0.05 + potentials).softmax(1), codes)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_policies(bad: float) -> None:
    scores = cosines(64, 6)
    scores[3, 2] = bad
    assert sinkhorn(scores).isnan().all()
    isolated = sinkhorn(scores, nan_policy="isolate")
    others = torch.arange(64) != 3
    assert isolated[3].isnan().all()
    torch.testing.assert_close(isolated[others], sinkhorn(scores[others]))
    with pytest.raises(ValueError, match=r"1 rows that hold one \(first: row 3\)"):
        sinkhorn(scores, nan_policy="raise")
    scores[3] = -math.inf
    torch.testing.assert_close(sinkhorn(scores, nan_policy="isolate")[others], sinkhorn(scores[others]))
    with pytest.raises(ValueError, match="row of only -inf"):
        sinkhorn(scores, nan_policy="raise")


def test_no_gradient_flows_through_codes() -> None:
    scores = cosines(16, 4).requires_grad_()
    assert not sinkhorn(scores).requires_grad
    codes, potentials = torch.ops.proto_reg.sinkhorn(scores, None, None, 0.05, 3, None, False)
    assert not codes.requires_grad
    assert not potentials.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fullgraph(dtype: torch.dtype) -> None:
    scores = cosines(33, 7).to(dtype)
    torch.testing.assert_close(torch.compile(sinkhorn, fullgraph=True)(scores), sinkhorn(scores))


def test_odd_layouts() -> None:
    scores = cosines(34, 10)
    torch.testing.assert_close(sinkhorn(scores.T.contiguous().T), sinkhorn(scores))
    torch.testing.assert_close(sinkhorn(scores[::2, 1::3]), sinkhorn(scores[::2, 1::3].contiguous()))


def test_module_hands_over_its_options() -> None:
    scores = cosines(50, 3)
    marginals = [0.5, 0.25, 0.25]
    module = SinkhornAssigner(0.1, 5, tol=1e-3, marginals=marginals)
    torch.testing.assert_close(module(scores), sinkhorn(scores, 0.1, 5, tol=1e-3, marginals=marginals))
    assert "marginals" in module.state_dict()
    assert not module(scores.requires_grad_()).requires_grad


def test_the_modules_codes_carry_no_gradient(backend: str) -> None:
    scores = cosines(40, 6).requires_grad_()
    mask = torch.arange(40) > 3
    for assigner in (SinkhornAssigner(), SinkhornAssigner(tol=1e-3, nan_policy="isolate", marginals=[1 / 6] * 6)):
        for codes in (assigner(scores), assigner(scores, mask)):
            assert not codes.requires_grad
            assert codes.grad_fn is None
