"""Gradients through the iterations equal those of the problem without left-out entries. There they are 0, never NaN."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import cosines, log_sinkhorn
from torch import Tensor

from proto_reg.functional import (
    anchored_mmd,
    prototype_cross_entropy,
    sinkhorn,
    sinkhorn_cross_entropy,
    sinkhorn_cross_entropy_and_gradient,
)

ROWS, COLUMNS, EPSILON, ITERS = 9, 6, 0.3, 4
KEPT_ROWS = torch.tensor([True, True, False, True, True, True, False, True, True])
KEPT_COLUMNS = torch.tensor([True, False, True, True, False, True])
SHARES = torch.tensor([0.3, 0.0, 0.2, 0.1, 0.0, 0.4])
ONES = torch.ones(ROWS, dtype=torch.bool), torch.ones(COLUMNS, dtype=torch.bool)
FAR = {"tol": 1e-5}

# For each case: the kept rows and columns, the options for this, and the value of the scores that are left out.
LEFT_OUT = {
    "nothing": (*ONES, {}, 0.0),
    "tol": (*ONES, FAR, 0.0),
    "prototype_mask": (ONES[0], KEPT_COLUMNS, {"prototype_mask": KEPT_COLUMNS}, 0.0),
    "prototype_mask, NaN": (ONES[0], KEPT_COLUMNS, {"prototype_mask": KEPT_COLUMNS}, math.nan),
    "prototype_mask, tol": (ONES[0], KEPT_COLUMNS, {"prototype_mask": KEPT_COLUMNS} | FAR, math.inf),
    "marginals of 0": (ONES[0], KEPT_COLUMNS, {"marginals": SHARES}, 0.0),
    "marginals of 0, tol": (ONES[0], KEPT_COLUMNS, {"marginals": SHARES} | FAR, 0.0),
    "columns of -inf": (ONES[0], KEPT_COLUMNS, {}, -math.inf),
    "mask": (KEPT_ROWS, ONES[1], {"mask": KEPT_ROWS}, 0.0),
    "mask, NaN": (KEPT_ROWS, ONES[1], {"mask": KEPT_ROWS}, math.nan),
    "mask, rows of -inf": (KEPT_ROWS, ONES[1], {"mask": KEPT_ROWS}, -math.inf),
    "weights of 0": (KEPT_ROWS, ONES[1], {"weights": KEPT_ROWS.float()}, 0.0),
    "weights of 0, tol": (KEPT_ROWS, ONES[1], {"weights": KEPT_ROWS.float()} | FAR, math.inf),
    "isolated rows": (KEPT_ROWS, ONES[1], {"nan_policy": "isolate"}, math.nan),
    "both masks": (KEPT_ROWS, KEPT_COLUMNS, {"mask": KEPT_ROWS, "prototype_mask": KEPT_COLUMNS}, math.nan),
}


def problem(case: str, scores: Tensor) -> tuple[Tensor, dict, Tensor]:
    """Scores with a value at the left-out entries, the options, and a mask (ROWS, COLUMNS) of the kept entries."""
    rows, columns, options, value = LEFT_OUT[case]
    kept = rows[:, None] & columns
    return scores if value == 0 else torch.where(kept, scores, value), options, kept


def expected(case: str, scores: Tensor, by_codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and gradient of the problem without left-out entries, by the plain formula in float64. There they are 0."""
    rows, columns, options, _ = LEFT_OUT[case]
    reduced = scores.double()[rows][:, columns].requires_grad_()
    marginals = options["marginals"][columns] if "marginals" in options else None
    iterations = 2000 if "tol" in options else ITERS
    codes = log_sinkhorn(reduced, EPSILON, iterations, marginals)
    (codes * by_codes.double()[rows][:, columns]).sum().backward()
    whole = [torch.zeros(ROWS, COLUMNS, dtype=torch.float64) for _ in range(2)]
    for target, part in zip(whole, (codes.detach(), reduced.grad), strict=True):
        target[rows[:, None] & columns] = part.flatten()
    return whole[0], whole[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", LEFT_OUT)
def test_gradient_is_that_of_the_problem_without_what_is_left_out(case: str, dtype: torch.dtype) -> None:
    scores, by_codes = cosines(ROWS, COLUMNS, dtype), torch.randn(ROWS, COLUMNS, dtype=dtype)
    wanted, gradient = expected(case, scores, by_codes)
    given, options, kept = problem(case, scores)
    leaf = given.clone().requires_grad_()
    codes = sinkhorn(leaf, EPSILON, 2000 if "tol" in options else ITERS, differentiable=True, **options)
    # Rows that do not count get codes, too. The loss must not use them here.
    counted = LEFT_OUT[case][0][:, None]
    torch.where(counted, codes * by_codes, 0.0).sum().backward()
    close = 1e-3 if "tol" in options else 2e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(torch.where(counted, codes, 0.0).double(), wanted, rtol=close, atol=close)
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=close, atol=close)
    assert not leaf.grad[~kept].any()


def test_gradients_of_groups_with_masks_of_their_own() -> None:
    scores = torch.stack([cosines(ROWS, COLUMNS, torch.float64) for _ in range(2)])
    by_codes = torch.randn_like(scores)
    allowed = torch.stack([KEPT_COLUMNS, ~KEPT_COLUMNS])
    leaf = torch.where(allowed[:, None], scores, torch.nan).requires_grad_()
    codes = sinkhorn(leaf, EPSILON, ITERS, prototype_mask=allowed, differentiable=True)
    (codes * by_codes).sum().backward()
    for group in range(2):
        columns = allowed[group]
        reduced = scores[group][:, columns].requires_grad_()
        (log_sinkhorn(reduced, EPSILON, ITERS) * by_codes[group][:, columns]).sum().backward()
        torch.testing.assert_close(leaf.grad[group][:, columns], reduced.grad, rtol=0, atol=1e-11)
        assert not leaf.grad[group][:, ~columns].any()


def test_gradient_beside_single_scores_of_minus_infinity() -> None:
    """It is the limit of very low scores. At -1000 epsilon their codes are 0 in float64, too."""
    scores, by_codes = cosines(ROWS, COLUMNS, torch.float64), torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    impossible = torch.rand(ROWS, COLUMNS) > 0.7
    gradients = []
    for value in (-1000 * EPSILON, -math.inf):
        leaf = scores.masked_fill(impossible, value).requires_grad_()
        (sinkhorn(leaf, EPSILON, ITERS, differentiable=True) * by_codes).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)
    assert not gradients[1][impossible].any()


def test_no_row_of_any_weight_is_no_nan() -> None:
    leaf = cosines(ROWS, COLUMNS).requires_grad_()
    sinkhorn(leaf, mask=torch.zeros(ROWS, dtype=torch.bool), differentiable=True)[0, 0].backward()
    assert leaf.grad.isfinite().all()


def test_weights_and_marginals_have_gradients() -> None:
    scores = cosines(ROWS, COLUMNS, torch.float64).requires_grad_()
    weights = (torch.rand(ROWS, dtype=torch.float64) + 0.1).requires_grad_()
    marginals = torch.rand(COLUMNS, dtype=torch.float64).softmax(0).requires_grad_()

    def codes(s: Tensor, w: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        options = {"differentiable": True, "return_potentials": True, "mask": KEPT_ROWS}
        return sinkhorn(s, EPSILON, ITERS, weights=w, marginals=m, **options)

    assert torch.autograd.gradcheck(codes, (scores, weights, marginals))
    codes(scores, weights, marginals)[0][0].square().sum().backward()
    assert weights.grad[KEPT_ROWS].all()
    assert not weights.grad[~KEPT_ROWS].any()


def test_weights_and_marginals_of_0_have_a_gradient_of_0() -> None:
    weights, marginals = KEPT_ROWS.double().requires_grad_(), SHARES.double().requires_grad_()
    scores, by_codes = cosines(ROWS, COLUMNS, torch.float64), torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    codes = sinkhorn(scores, EPSILON, ITERS, weights=weights, marginals=marginals, differentiable=True)
    (codes * by_codes)[KEPT_ROWS].sum().backward()
    reduced = torch.ones(int(KEPT_ROWS.sum()), dtype=torch.float64, requires_grad=True)
    shares = SHARES[KEPT_COLUMNS].double().requires_grad_()
    part = scores[KEPT_ROWS][:, KEPT_COLUMNS]
    codes = sinkhorn(part, EPSILON, ITERS, weights=reduced, marginals=shares, differentiable=True)
    (codes * by_codes[KEPT_ROWS][:, KEPT_COLUMNS]).sum().backward()
    torch.testing.assert_close(weights.grad[KEPT_ROWS], reduced.grad)
    torch.testing.assert_close(marginals.grad[KEPT_COLUMNS], shares.grad)
    assert not weights.grad[~KEPT_ROWS].any()
    assert not marginals.grad[~KEPT_COLUMNS].any()


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_codes_are_constants_to_marginals_and_weights_too(name: str) -> None:
    marginals = torch.full((COLUMNS,), 1 / COLUMNS, requires_grad=True)
    weights = torch.ones(ROWS, requires_grad=True)
    codes, potentials = sinkhorn(
        cosines(ROWS, COLUMNS), marginals=marginals, weights=weights, return_potentials=True, backend=name
    )
    assert not codes.requires_grad
    assert not potentials.requires_grad


def test_a_cross_entropy_says_that_weights_have_no_gradient() -> None:
    scores, weights = cosines(ROWS, COLUMNS).requires_grad_(), torch.ones(ROWS, requires_grad=True)
    with pytest.raises(ValueError, match=r"weights: expected a tensor without gradient.*weights\.detach\(\)"):
        sinkhorn_cross_entropy(scores, weights=weights)
    sinkhorn_cross_entropy(scores, weights=weights.detach()).backward()
    with torch.no_grad():
        sinkhorn_cross_entropy(scores, weights=weights)
        sinkhorn_cross_entropy_and_gradient(scores, weights=weights)


def test_cross_entropy_beside_scores_of_minus_infinity() -> None:
    scores = cosines(ROWS, COLUMNS)
    codes = sinkhorn(scores, prototype_mask=KEPT_COLUMNS)
    leaf = scores.masked_fill(~KEPT_COLUMNS, -torch.inf).requires_grad_()
    loss = prototype_cross_entropy(leaf, codes)
    loss.backward()
    reduced = scores[:, KEPT_COLUMNS].double().requires_grad_()
    wanted = -(codes[:, KEPT_COLUMNS].double() * (reduced / 0.1).log_softmax(1)).sum(1).mean()
    wanted.backward()
    torch.testing.assert_close(loss.detach().double(), wanted.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad[:, KEPT_COLUMNS].double(), reduced.grad, rtol=0, atol=1e-6)
    assert not leaf.grad[:, ~KEPT_COLUMNS].any()


def test_cross_entropy_of_the_largest_scores() -> None:
    leaf = (cosines(ROWS, COLUMNS).sign() * torch.finfo(torch.float32).max / 4).requires_grad_()
    prototype_cross_entropy(leaf, torch.nn.functional.one_hot(leaf.argmax(1), COLUMNS).float()).backward()
    assert leaf.grad.isfinite().all()


def test_torch_func_goes_past_masked_rows_and_columns() -> None:
    scores = cosines(ROWS, COLUMNS)
    bad = torch.where(KEPT_ROWS[:, None] & KEPT_COLUMNS, scores, torch.nan)
    options = {"mask": KEPT_ROWS, "prototype_mask": KEPT_COLUMNS}
    gradient = torch.func.grad(lambda s: sinkhorn_cross_entropy(s, **options))(bad)
    wanted = sinkhorn_cross_entropy_and_gradient(scores[KEPT_ROWS][:, KEPT_COLUMNS].double())[1]
    torch.testing.assert_close(gradient[KEPT_ROWS][:, KEPT_COLUMNS].double(), wanted, rtol=0, atol=1e-6)
    assert not gradient[~KEPT_ROWS].any()
    assert not gradient[:, ~KEPT_COLUMNS].any()


@pytest.mark.parametrize("kernel", ["gaussian", "imq", "energy"])
@pytest.mark.parametrize("soft", [False, True])
def test_mmd_ignores_masked_latents_be_they_nan(soft: bool, kernel: str) -> None:
    z, v = torch.randn(ROWS, 4), torch.randn(3, 4)
    members = torch.rand(ROWS, 3).softmax(1) if soft else torch.arange(ROWS) % 3
    found = []
    for bad in (False, True):
        leaf = torch.where(KEPT_ROWS[:, None], z, torch.nan if bad else 0.0).requires_grad_()
        anchors = v.clone().requires_grad_()
        if soft:
            members = torch.where(KEPT_ROWS[:, None], members, torch.nan if bad else 0.5)
        loss = anchored_mmd(leaf, anchors, members, mask=KEPT_ROWS, kernel=kernel)
        loss.backward()
        found.append((loss.detach(), leaf.grad, anchors.grad))
        assert not leaf.grad[~KEPT_ROWS].any()
    for clean, spoilt in zip(*found, strict=True):
        assert spoilt.isfinite().all()
        torch.testing.assert_close(spoilt, clean)
