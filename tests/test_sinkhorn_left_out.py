"""Prototypes that take no part: their scores may be anything, and a row that has no others is the one that is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import cosines

from proto_reg import SinkhornAssigner
from proto_reg.functional import sinkhorn, sinkhorn_cross_entropy, sinkhorn_cross_entropy_and_gradient

pytestmark = pytest.mark.usefixtures("backend")

NAN, INF = math.nan, math.inf
ALLOWED = torch.tensor([True, False, True, True, False, True, True])
ANYTHING = (NAN, INF, -INF, 3e38, -3e38)


def spoilt(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """The scores with any values in the columns that are not ``allowed``. The values differ between the rows."""
    rubbish = torch.tensor(ANYTHING).repeat(len(scores))[: len(scores), None]
    return torch.where(allowed, scores.double(), rubbish.double()).to(scores.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("nan_policy", ["propagate", "isolate", "raise"])
def test_columns_left_out_may_hold_anything(nan_policy: str, scale: float, dtype: torch.dtype) -> None:
    scores = (scale * cosines(50, 7)).to(dtype)
    options = {"prototype_mask": ALLOWED, "nan_policy": nan_policy}
    given = spoilt(scores, ALLOWED)
    codes, potentials = sinkhorn(given, return_potentials=True, **options)
    alone, g = sinkhorn(scores[:, ALLOWED], return_potentials=True)
    assert not codes[:, ~ALLOWED].any()
    torch.testing.assert_close(codes[:, ALLOWED], alone, rtol=0, atol=2e-6 if dtype != torch.float16 else 1e-3)
    shift = (potentials[ALLOWED] - g).mean()
    torch.testing.assert_close(potentials[ALLOWED] - shift, g, rtol=1e-5, atol=1e-4)
    assert (potentials[~ALLOWED] == -INF).all()
    assert torch.equal(sinkhorn(given, hard=True, **options)[:, ALLOWED], sinkhorn(scores[:, ALLOWED], hard=True))
    out = torch.empty_like(scores)
    assert sinkhorn(given, out=out, **options) is out
    torch.testing.assert_close(out, codes)


def test_groups_leave_out_columns_of_their_own() -> None:
    scores = torch.stack([cosines(30, 7) for _ in range(3)])
    allowed = torch.stack([ALLOWED, ~ALLOWED, torch.arange(7) < 5])
    given = torch.stack([spoilt(s, a) for s, a in zip(scores, allowed, strict=True)])
    codes = sinkhorn(given, prototype_mask=allowed)
    for group in range(3):
        alone = sinkhorn(scores[group][:, allowed[group]])
        torch.testing.assert_close(codes[group][:, allowed[group]], alone, rtol=0, atol=2e-6)
        assert not codes[group][:, ~allowed[group]].any()
    shared = sinkhorn(torch.stack([spoilt(s, ALLOWED) for s in scores]), prototype_mask=ALLOWED)
    torch.testing.assert_close(shared[1][:, ALLOWED], sinkhorn(scores[1][:, ALLOWED]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [1, 30])
def test_cross_entropy_is_that_without_the_columns(scale: float) -> None:
    scores = scale * cosines(50, 7)
    reduced = scores[:, ALLOWED].double().requires_grad_()
    wanted = sinkhorn_cross_entropy(reduced)
    wanted.backward()
    for given in (scores, spoilt(scores, ALLOWED)):
        leaf = given.clone().requires_grad_()
        loss, codes = sinkhorn_cross_entropy(leaf, prototype_mask=ALLOWED, return_codes=True)
        loss.backward()
        torch.testing.assert_close(loss.detach().double(), wanted.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaf.grad[:, ALLOWED].double(), reduced.grad, rtol=0, atol=1e-6)
        assert not leaf.grad[:, ~ALLOWED].any()
        torch.testing.assert_close(codes[:, ALLOWED], sinkhorn(scores[:, ALLOWED]), rtol=0, atol=2e-6)
        assert not codes[:, ~ALLOWED].any()
        at_once = sinkhorn_cross_entropy_and_gradient(given, prototype_mask=ALLOWED)
        for value, same in zip(at_once, (loss.detach(), leaf.grad, codes), strict=True):
            torch.testing.assert_close(value, same)


def test_a_row_without_an_allowed_prototype_is_isolated_alone() -> None:
    scores, allowed = torch.tensor([[0.0, -INF], [0.0, 0.0]]), torch.tensor([False, True])
    isolated = sinkhorn(scores, prototype_mask=allowed, nan_policy="isolate")
    assert isolated[0].isnan().all()
    assert isolated[1].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"got 1 rows that hold one \(first: row 0\)"):
        sinkhorn(scores, prototype_mask=allowed, nan_policy="raise")
    assert sinkhorn(scores, prototype_mask=allowed).isnan().all()
    sinkhorn(scores[:, [1, 0]], prototype_mask=allowed, nan_policy="raise")  # the -inf is in a column that is left out


# Each option keeps prototypes 0, 2, 3, 5 and 6, with these shares.
SHARES = torch.where(ALLOWED, 0.2, 0.0)
WAYS = {
    "prototype_mask": {"prototype_mask": ALLOWED},
    "marginals": {"marginals": SHARES},
    "both": {"marginals": [0.16, 0.1, 0.16, 0.16, 0.1, 0.16, 0.16], "prototype_mask": ALLOWED},
}


def with_a_lost_row(scale: float = 1.0) -> torch.Tensor:
    scores = scale * cosines(20, 7)
    scores[3, ALLOWED] = -INF
    return scores


OTHERS = torch.arange(20) != 3


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("way", WAYS)
def test_isolated_rows_are_absent(way: str, scale: float) -> None:
    scores, options = with_a_lost_row(scale), WAYS[way] | {"nan_policy": "isolate"}
    weights = torch.rand(20) + 0.5
    for extra, less in (({}, {}), ({"weights": weights}, {"weights": weights[OTHERS]})):
        codes = sinkhorn(scores, **options, **extra)
        assert codes[3].isnan().all()
        alone = sinkhorn(scores[OTHERS][:, ALLOWED], **less)
        torch.testing.assert_close(codes[OTHERS][:, ALLOWED], alone, rtol=0, atol=2e-6)
        assert not codes[OTHERS][:, ~ALLOWED].any()
        leaf = scores.clone().requires_grad_()
        loss, codes = sinkhorn_cross_entropy(leaf, **options, **extra, return_codes=True)
        loss.backward()
        part = scores[OTHERS].clone().requires_grad_()
        wanted = sinkhorn_cross_entropy(part, **WAYS[way], **less)
        wanted.backward()
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(leaf.grad[OTHERS], part.grad, rtol=0, atol=2e-6)
        assert not leaf.grad[3].any()
        assert codes[3].isnan().all()
    grouped = torch.stack([scores, scale * cosines(20, 7)])
    assert sinkhorn(grouped, **options).isnan().any(-1).nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("way", WAYS)
def test_raise_names_the_row_that_counts(way: str) -> None:
    scores = with_a_lost_row()
    for function in (sinkhorn, sinkhorn_cross_entropy, sinkhorn_cross_entropy_and_gradient):
        with pytest.raises(ValueError, match=r"got 1 rows that hold one \(first: row 3\)"):
            function(scores, nan_policy="raise", **WAYS[way])
        function(scores, nan_policy="raise", mask=OTHERS, **WAYS[way])
        function(scores, nan_policy="raise", weights=OTHERS.float(), **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_a_masked_row_may_be_without_a_prototype(way: str) -> None:
    scores = with_a_lost_row()
    codes = sinkhorn(scores, mask=OTHERS, **WAYS[way])
    alone = sinkhorn(scores[OTHERS][:, ALLOWED])
    torch.testing.assert_close(codes[OTHERS][:, ALLOWED], alone, rtol=0, atol=2e-6)


def test_the_assigner_isolates_by_its_marginals() -> None:
    scores = with_a_lost_row()
    assigner = SinkhornAssigner(marginals=SHARES, nan_policy="isolate")
    codes = assigner(scores)
    assert codes[3].isnan().all()
    torch.testing.assert_close(codes[OTHERS][:, ALLOWED], sinkhorn(scores[OTHERS][:, ALLOWED]), rtol=0, atol=2e-6)
    loss, gradient, _ = assigner.cross_entropy_and_gradient(scores, 0.1)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="first: row 3"):
        SinkhornAssigner(marginals=SHARES, nan_policy="raise")(scores)


def test_a_nan_in_a_column_of_share_0_is_one() -> None:
    scores = cosines(20, 7)
    scores[3, 1] = NAN
    assert sinkhorn(scores, marginals=SHARES).isnan().all()
    assert sinkhorn(scores, marginals=SHARES, nan_policy="isolate").isnan().all(1).nonzero().tolist() == [[3]]


def test_the_largest_scores_beside_a_column_that_gets_nothing() -> None:
    scores = torch.tensor([[0.0, -3e38, -3.1e38], [0.0, 0.0, 0.0]])
    for options in ({"marginals": [0.0, 0.5, 0.5]}, {"prototype_mask": torch.tensor([False, True, True])}):
        codes = sinkhorn(scores, **options)
        torch.testing.assert_close(codes[:, 1:], sinkhorn(scores[:, 1:]), rtol=0, atol=1e-6)
        assert not codes[:, 0].any()


@pytest.mark.parametrize("num_iters", [2, 50])
def test_tol_lets_nan_through_to_every_code(num_iters: int) -> None:
    for bad in (NAN, INF, -INF):
        scores = cosines(20, 7)
        scores[3] = bad
        assert sinkhorn(scores, 0.05, num_iters, tol=0.1).isnan().all()


@pytest.mark.slow
def test_fullgraph() -> None:
    scores = cosines(33, 7)
    compiled = torch.compile(lambda s: sinkhorn(s, prototype_mask=ALLOWED), fullgraph=True)
    torch.testing.assert_close(compiled(spoilt(scores, ALLOWED)), sinkhorn(scores, prototype_mask=ALLOWED))
