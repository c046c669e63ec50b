"""What Sinkhorn tells about its iterations, warm starts, and columns with slack."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import cosines, log_sinkhorn
from torch import Tensor

from proto_reg import PrototypeWarning, SinkhornAssigner
from proto_reg.functional import SinkhornInfo, sinkhorn

pytestmark = pytest.mark.usefixtures("backend")


def column_error(codes: Tensor, marginals: Tensor | None = None, weights: Tensor | None = None) -> float:
    """The largest relative error of a column of ``codes`` (B, K), in float64."""
    weights = torch.ones(len(codes)) if weights is None else weights
    shares = (weights.double() @ codes.double()) / weights.double().sum()
    marginals = torch.full_like(shares, 1 / len(shares)) if marginals is None else marginals.double()
    return (shares[marginals > 0] / marginals[marginals > 0] - 1).abs().max().item()


def relaxed_loop(scores: Tensor, epsilon: float, num_iters: int, slack: float, r: Tensor, w: Tensor) -> Tensor:
    """Chizat et al.'s iteration on scaling vectors in float64: rows meet w, columns are drawn to r. Codes (B, K)."""
    kernel = (scores.double() / epsilon).exp() * (w / w.sum()).double()[:, None]
    u = torch.ones(len(scores), dtype=torch.float64)
    for _ in range(num_iters):
        v = (r.double() / (kernel.T @ u)) ** (slack / (slack + epsilon))
        u = 1 / ((scores.double() / epsilon).exp() @ v)
    return (scores.double() / epsilon).exp() * u[:, None] * v


# ------------------------------------------------------------------------------------------------------------ info


@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_error_is_that_of_the_columns(dtype: torch.dtype, tol: float | None) -> None:
    scores = cosines(200, 12).to(dtype)
    marginals, weights = torch.rand(12).softmax(0), torch.rand(200)
    weights[:20] = 0
    for options in ({}, {"marginals": marginals}, {"weights": weights}, {"marginals": marginals, "weights": weights}):
        codes, info = sinkhorn(scores, 0.1, 50 if tol else 3, tol=tol, return_info=True, **options)
        assert isinstance(info, SinkhornInfo)
        assert codes.dtype == dtype
        exact = column_error(codes, **options)
        assert abs(info.error - exact) < (5e-4 if dtype == torch.float16 else 3e-6)
        assert bool(info.converged) == (tol is not None)
        assert (info.error <= 1e-3) == (tol is not None)
        same = sinkhorn(scores, 0.1, 50 if tol else 3, tol=tol, **options)
        torch.testing.assert_close(codes, same, rtol=0, atol=1e-3 if dtype == torch.float16 else 2e-6)


def test_iterations_are_as_many_as_reach_tol() -> None:
    scores = cosines(200, 12, dtype=torch.float64)
    _, info = sinkhorn(scores, 0.1, 7, return_info=True)
    assert info.iterations == 7
    _, info = sinkhorn(scores, 0.1, 500, tol=1e-4, return_info=True)
    count = int(info.iterations)
    assert column_error(log_sinkhorn(scores, 0.1, count)) <= 1e-4 < column_error(log_sinkhorn(scores, 0.1, count - 1))
    _, info = sinkhorn(scores, 0.1, count - 1, tol=1e-4, return_info=True)
    assert info.iterations == count - 1
    assert not info.converged


def test_info_of_every_problem_and_option() -> None:
    scores = torch.stack([cosines(40, 6), 0.01 * cosines(40, 6)]).view(2, 1, 40, 6).expand(2, 3, 40, 6)
    _, g, info = sinkhorn(scores, 0.1, 200, tol=1e-4, return_info=True, return_potentials=True)
    assert g.shape == (2, 3, 6)
    assert info.iterations.shape == info.error.shape == info.converged.shape == (2, 3)
    for i in range(2):
        _, alone = sinkhorn(scores[i, 0], 0.1, 200, tol=1e-4, return_info=True)
        assert (info.iterations[i] == alone.iterations).all()
        torch.testing.assert_close(info.error[i], alone.error.expand(3), rtol=0, atol=1e-6)
    allowed, broken = torch.arange(6) > 1, cosines(40, 6)
    broken[3, 2] = torch.nan
    codes, info = sinkhorn(broken, 0.1, 200, tol=1e-4, nan_policy="isolate", prototype_mask=allowed, return_info=True)
    assert info.converged
    assert codes[3].isnan().all()
    _, info = sinkhorn(broken, return_info=True)
    assert info.error.isnan()
    assert not info.converged
    out = torch.empty_like(broken)
    codes, _ = sinkhorn(cosines(40, 6), return_info=True, out=out, hard=True)
    assert codes is out
    assert (codes.sum(1) == 1).all()


def test_info_with_gradients() -> None:
    scores = cosines(9, 4, dtype=torch.float64).requires_grad_()
    for options in ({}, {"tol": 1e-3}, {"slack": 0.2}):
        codes, info = sinkhorn(scores, 0.3, 4, differentiable=True, return_info=True, **options)
        assert codes.requires_grad
        assert not info.error.requires_grad
    assert torch.autograd.gradcheck(
        lambda s: sinkhorn(s, 0.3, 4, tol=1e-9, differentiable=True, return_info=True)[0], scores
    )


def test_it_stops_where_float32_can_do_no_better() -> None:
    scores = cosines(300, 20)
    with pytest.warns(PrototypeWarning, match="counts in its place"):
        _, info = sinkhorn(scores, 0.1, 10_000, tol=1e-12, return_info=True)
    assert info.converged  # within what float32 can tell
    assert info.iterations < 1000
    assert info.error < 2e-6
    # Potentials of hundreds are rounded to 2e-5. That error remains, and more iterations would not reduce it.
    with pytest.warns(PrototypeWarning, match="the iterations ended at an error"):
        _, info = sinkhorn(30 * scores, 0.1, 10_000, tol=2e-6, return_info=True, backend="torch")
    assert not info.converged
    assert info.iterations < 10_000
    assert info.error < 1e-4


# ------------------------------------------------------------------------------------------------------ warm starts


@pytest.mark.parametrize("options", ["", "weights", "marginals", "prototype_mask", "mask"])
@pytest.mark.parametrize("scale", [1, 30])
def test_a_warm_start_goes_on(scale: float, options: str) -> None:
    scores = scale * cosines(60, 7)
    every = {
        "weights": torch.rand(60) + 0.1,
        "mask": torch.rand(60) > 0.3,
        "marginals": torch.rand(7).softmax(0),
        "prototype_mask": torch.arange(7) != 2,
    }
    given = {name: value for name, value in every.items() if name == options}
    if options == "prototype_mask":
        scores[:, 2] = torch.nan
    _, halfway = sinkhorn(scores, 0.05, 3, return_potentials=True, **given)
    codes, g = sinkhorn(scores, 0.05, 4, potentials=halfway, return_potentials=True, **given)
    exact, expected = sinkhorn(scores.double(), 0.05, 7, return_potentials=True, **given)
    torch.testing.assert_close(codes.double(), exact, rtol=0, atol=2e-6 if scale == 1 else 3e-5)
    torch.testing.assert_close(g.double(), expected, rtol=1e-5, atol=1e-4)  # nothing is added at each start


def test_a_warm_start_of_groups_gradients_and_dtypes() -> None:
    scores = torch.stack([cosines(33, 5) for _ in range(6)]).view(2, 3, 33, 5)
    _, g = sinkhorn(scores, 0.1, 2, return_potentials=True)
    codes = sinkhorn(scores, 0.1, 3, potentials=g)
    torch.testing.assert_close(codes, sinkhorn(scores, 0.1, 5), rtol=0, atol=2e-6)
    torch.testing.assert_close(sinkhorn(scores, 0.1, 3, potentials=g[1, 1])[1, 1], codes[1, 1], rtol=0, atol=1e-6)
    half = sinkhorn(scores.half(), 0.1, 3, potentials=g, out=torch.empty_like(scores, dtype=torch.half))
    torch.testing.assert_close(half.float(), codes, rtol=0, atol=5e-3)
    wide = scores[0, 0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sinkhorn(s, 0.3, 2, potentials=g[0, 0], differentiable=True), wide)


def test_a_warm_start_from_anywhere_ends_in_the_same_place() -> None:
    scores = cosines(50, 6)
    best = sinkhorn(scores, 0.1, 500)
    for start in (torch.zeros(6), 300 * torch.randn(6), torch.tensor([-math.inf, 0, 0, 0, 0, 0])):
        codes = sinkhorn(scores, 0.1, 500, potentials=start)
        # Potentials of 600 are rounded to 3e-5, and the scores that they are added to with them.
        torch.testing.assert_close(codes, best, rtol=0, atol=6e-5)
        assert sinkhorn(scores, 0.1, 1, potentials=start).isfinite().all()


def test_the_other_start_under_weights() -> None:
    """Packages that begin with u = 1 leave the weights out of the first step."""
    scores, weights = cosines(40, 6, dtype=torch.float64), torch.rand(40).double() + 0.1
    kernel, share, r = (scores / 0.1).exp(), weights / weights.sum(), torch.full((6,), 1 / 6, dtype=torch.float64)
    u = torch.ones(40, dtype=torch.float64)
    for _ in range(4):
        v = r / (kernel.T @ u)
        u = share / (kernel @ v)
    _, first = sinkhorn(scores, 0.1, 1, return_potentials=True)
    codes = sinkhorn(scores, 0.1, 3, weights=weights, potentials=first)
    torch.testing.assert_close(codes, u[:, None] * kernel * v / share[:, None], rtol=0, atol=1e-12)


def test_few_warm_iterations_suffice_for_scores_that_change_slowly() -> None:
    scores = cosines(500, 20)
    _, g = sinkhorn(scores, 0.05, 500, tol=1e-4, return_potentials=True)
    moved = scores + 1e-3 * torch.randn(500, 20)
    _, cold = sinkhorn(moved, 0.05, 500, tol=1e-2, return_info=True)
    _, warm = sinkhorn(moved, 0.05, 500, tol=1e-2, return_info=True, potentials=g)
    assert warm.converged
    assert warm.iterations < cold.iterations / 3


# ------------------------------------------------------------------------------------------------------------ slack


@pytest.mark.parametrize("slack", [1e-3, 0.1, 10])
@pytest.mark.parametrize("num_iters", [1, 2, 9])
def test_slack_is_the_damped_iteration(num_iters: int, slack: float) -> None:
    scores, r, w = cosines(60, 7), torch.rand(7).softmax(0), torch.rand(60) + 0.1
    w[:5] = 0
    codes = sinkhorn(scores, 0.1, num_iters, slack=slack, marginals=r, weights=w)
    expected = relaxed_loop(scores, 0.1, num_iters, slack, r / r.sum(), w)
    torch.testing.assert_close(codes.double(), expected, rtol=0, atol=2e-6)
    groups = sinkhorn(scores.expand(2, 60, 7), 0.1, num_iters, slack=slack, marginals=r, weights=w.expand(2, 60))
    torch.testing.assert_close(groups, codes.expand(2, 60, 7), rtol=0, atol=1e-6)


def test_slack_minimises_its_objective() -> None:
    scores, r = cosines(30, 5, dtype=torch.float64), torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1], dtype=torch.float64)
    codes, info = sinkhorn(scores, 0.2, 500, tol=1e-12, slack=0.5, marginals=r, return_info=True)
    assert info.converged
    logits = codes.log().requires_grad_()
    log_q = logits.log_softmax(1)
    q, shares = log_q.exp(), log_q.exp().mean(0)
    loss = (0.2 * q * log_q - q * scores).sum(1).mean() + 0.5 * (shares * (shares / r).log()).sum()
    loss.backward()  # it is convex in q: a stationary point is its minimum
    assert logits.grad.abs().max() < 1e-12


def test_slack_from_nothing_to_balance() -> None:
    for scale in (1, 3000):  # spans no exponential could hold
        scores = scale * cosines(60, 7)
        loose, balanced = sinkhorn(scores, 0.1, 5, slack=1e-7), sinkhorn(scores, 0.1, 5, slack=1e9)
        torch.testing.assert_close(loose, (scores / 0.1).softmax(1), rtol=0, atol=1e-5)
        torch.testing.assert_close(balanced, sinkhorn(scores, 0.1, 5), rtol=0, atol=2e-6 if scale == 1 else 1e-3)
    errors = [column_error(sinkhorn(cosines(60, 7), 0.1, 300, slack=slack)) for slack in (0.01, 0.1, 1.0, 10.0)]
    assert errors == sorted(errors, reverse=True)


def test_slack_with_tol_info_masks_and_gradients() -> None:
    scores = cosines(60, 7)
    for slack in (1e-4, 0.1, 10):
        codes, info = sinkhorn(scores, 0.1, 1000, tol=1e-5, slack=slack, return_info=True)
        assert info.converged
        assert info.iterations < 200
        torch.testing.assert_close(codes, sinkhorn(scores, 0.1, 300, slack=slack), rtol=0, atol=1e-5)
    masked = scores.clone()
    masked[:, 2], masked[5] = torch.nan, torch.nan
    allowed, rows = torch.arange(7) != 2, torch.arange(60) != 5
    codes, g = sinkhorn(masked, 0.1, slack=0.2, prototype_mask=allowed, mask=rows, return_potentials=True)
    alone = sinkhorn(scores[rows][:, allowed], 0.1, slack=0.2)
    torch.testing.assert_close(codes[rows][:, allowed], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close((scores[rows] / 0.1 + g).softmax(1), codes[rows], rtol=0, atol=1e-6)
    wide, weights = scores[:9, :4].double().requires_grad_(), (torch.rand(9).double() + 0.1).requires_grad_()
    r = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64, requires_grad=True)

    def solve(s: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return sinkhorn(s, 0.3, 3, slack=0.2, weights=w, marginals=r / r.sum(), differentiable=True)

    assert torch.autograd.gradcheck(solve, (wide, weights, r))
    scores[:, 3] = -math.inf  # gets nothing, and no gradient
    leaf = scores.requires_grad_()
    (sinkhorn(leaf, 0.1, slack=0.2, differentiable=True) ** 2).sum().backward()
    assert leaf.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- the rest


def test_it_compiles_without_a_break() -> None:
    scores = cosines(40, 6)
    for options in ({}, {"tol": 1e-3}, {"slack": 0.2}, {"slack": 0.2, "tol": 1e-3}, {"potentials": torch.zeros(6)}):

        def solve(s: Tensor, options: dict = options) -> tuple[Tensor, Tensor]:
            codes, info = sinkhorn(s, 0.1, 50, return_info=True, **options)
            return codes, info.iterations

        found = torch.compile(solve, fullgraph=True, backend="eager")(scores)
        for one, other in zip(found, solve(scores), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_options_that_exclude_each_other() -> None:
    scores = cosines(6, 3)
    with pytest.raises(ValueError, match=r"slack: expected None with potentials, got 0\.1"):
        sinkhorn(scores, slack=0.1, potentials=torch.zeros(3))
    with pytest.raises(ValueError, match="slack: expected a finite number > 0"):
        sinkhorn(scores, slack=0.0)
    with pytest.raises(ValueError, match="backend: expected 'auto' or 'torch' with slack, got 'cpu'"):
        sinkhorn(scores, slack=0.1, backend="cpu")
    for options in ({"backend": "cpu", "differentiable": True}, {"backend": "cuda"}):
        with pytest.raises(ValueError, match="backend: expected 'auto' or 'torch' with return_info and tol"):
            sinkhorn(scores, tol=0.1, return_info=True, **options)
    with pytest.raises(ValueError, match="differentiable: expected False"):
        sinkhorn(scores, slack=0.1, differentiable=True, hard=True)
    for options, name in (({"slack": 0.1}, "slack"), ({"tol": 0.1, "return_info": True}, "return_info and tol")):
        with pytest.raises(ValueError, match=f"differentiable: expected False or True with {name}, got 'implicit'"):
            sinkhorn(scores, differentiable="implicit", **options)
    with pytest.raises(ValueError, match="differentiable: expected False, True or 'implicit', got 'unrolled'"):
        sinkhorn(scores, differentiable="unrolled", return_info=True)
    with pytest.raises(ValueError, match=r"potentials: expected shape \(3,\), got \(2,\)"):
        sinkhorn(scores, potentials=torch.zeros(2))
    with pytest.raises(ValueError, match=r"potentials: expected shape \(3,\) or \(4, 3\), got \(6, 3\)"):
        sinkhorn(scores.expand(4, 6, 3), potentials=torch.zeros(6, 3))
    with pytest.raises(TypeError, match=r"potentials: expected a torch\.Tensor"):
        sinkhorn(scores, potentials=[0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="out: expected a contiguous tensor like scores"):
        sinkhorn(scores, slack=0.1, out=torch.empty(3, 6))
    with pytest.raises(TypeError, match=r"scores: expected a torch\.Tensor"):
        sinkhorn([[1.0]], return_info=True)


def test_attention_scores_with_a_causal_mask() -> None:
    """(batch, heads, queries, keys), from a transpose, with -inf above the diagonal."""
    queries = torch.randn(2, 9, 3, 8).transpose(1, 2)
    scores = (queries @ torch.randn(2, 3, 8, 9)).transpose(-1, -2)
    scores = scores.masked_fill(torch.ones(9, 9).triu(1) > 0, -math.inf).transpose(0, 1)
    assert not scores.is_contiguous()
    codes, g, info = sinkhorn(scores, 1.0, 20, return_potentials=True, return_info=True)
    assert info.error.shape == (3, 2)
    assert (codes[..., torch.ones(9, 9).triu(1) > 0] == 0).all()
    for i in range(3):
        for j in range(2):
            expected = log_sinkhorn(scores[i, j].double(), 1.0, 20)
            torch.testing.assert_close(codes[i, j].double(), expected, rtol=0, atol=2e-6)
            assert abs(info.error[i, j] - column_error(expected)) < 1e-4
    warm = sinkhorn(scores, 1.0, 5, potentials=g)
    torch.testing.assert_close(warm, sinkhorn(scores, 1.0, 25), rtol=0, atol=2e-6)
    assert sinkhorn(scores, 1.0, 20, slack=0.5).isfinite().all()
    leaf = scores.detach().clone().requires_grad_()
    (sinkhorn(leaf, 1.0, 20, differentiable=True) ** 2).sum().backward()
    assert leaf.grad.isfinite().all()


def test_the_assigner_takes_weights_and_masks() -> None:
    scores, weights, allowed = cosines(40, 6), torch.rand(40), torch.arange(6) > 1
    rows = torch.rand(40) > 0.3
    assigner = SinkhornAssigner(0.1, 4, marginals=[0.1, 0.1, 0.2, 0.2, 0.2, 0.2])
    options = {"weights": weights, "prototype_mask": allowed}
    expected = sinkhorn(scores, 0.1, 4, marginals=assigner.marginals, mask=rows, **options)
    assert torch.equal(assigner(scores, rows, **options), expected)
