"""The anchored MMD: statistics, invariances, limits and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import naive_mmd
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_reg import AnchoredMMDLoss
from proto_reg.functional import anchored_mmd
from proto_reg.functional.features import frequencies
from proto_reg.functional.mmd import DEFAULT_SCALES
from proto_reg.kernels import mmd_pairs
from proto_reg.kernels.closed_forms import KERNELS, attraction, diagonal, pair, self_term

STATISTICS = ("unbiased", "biased")


def random_case(rows: int, groups: int, dim: int, **kwargs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = torch.randn(rows, dim, dtype=torch.float64, **kwargs)
    v = torch.randn(groups, dim, dtype=torch.float64)
    assignments = torch.randint(groups, (rows,))
    assignments[: rows // 2] = 0  # one cluster is much larger than the others
    return z, v, assignments


@pytest.mark.parametrize("form", ["dense", "tiled"])
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "groups", "dim"), [(37, 5, 3), (300, 7, 5), (1100, 300, 2), (640, 1, 4)])
def test_equals_the_sum_over_clusters(monkeypatch, kernel, statistic, form, rows, groups, dim) -> None:
    monkeypatch.setitem(mmd_pairs.DENSE_LIMIT, "cpu", 10**9 if form == "dense" else 0)
    z, v, assignments = random_case(rows, groups, dim, requires_grad=True)
    loss = anchored_mmd(z, v, assignments, kernel=kernel, statistic=statistic)
    expected = naive_mmd(z, v, assignments, kernel, DEFAULT_SCALES, statistic == "unbiased")
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in (loss, expected)), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_hot_weights_equal_assignments(kernel: str, statistic: str) -> None:
    z, v, assignments = random_case(200, 6, 4)
    weights = torch.nn.functional.one_hot(assignments, 6).double()
    for reduction in ("mean", "sum"):
        options = {"kernel": kernel, "statistic": statistic, "reduction": reduction}
        torch.testing.assert_close(anchored_mmd(z, v, assignments, **options), anchored_mmd(z, v, weights, **options))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_follow_their_formula(kernel: str, statistic: str) -> None:
    z, v, _ = random_case(40, 3, 5)
    w = torch.rand(40, 3, dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        p = w[:, k] / w[:, k].sum()
        gram, _ = pair(kernel, torch.cdist(z, z).square(), 5, DEFAULT_SCALES)
        gram.fill_diagonal_(diagonal(kernel) if statistic == "biased" else 0.0)
        quadratic = p @ gram @ p
        quadratic = quadratic if statistic == "biased" else quadratic / (1 - p.square().sum())
        a, _ = attraction(kernel, (z - v[k]).square().sum(1), 5, DEFAULT_SCALES)
        mmd = quadratic - 2 * (p * a).sum() + self_term(kernel, 5, DEFAULT_SCALES)
        expected += w[:, k].sum() / w.sum() * mmd
    torch.testing.assert_close(anchored_mmd(z, v, w, kernel=kernel, statistic=statistic), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_unbiased_has_null_mean_zero_and_biased_is_never_negative(kernel: str) -> None:
    trials, n, dim = 3_000, 8, 16
    v = torch.randn(trials, dim, dtype=torch.float64)
    assignments = torch.arange(trials).repeat_interleave(n)
    z = v[assignments] + torch.randn(trials * n, dim, dtype=torch.float64)
    scales = list(DEFAULT_SCALES)
    residuals = z - v[assignments]
    unbiased, _ = torch.ops.proto_reg.anchored_mmd(residuals, assignments, trials, kernel, scales, True, None)
    biased, _ = torch.ops.proto_reg.anchored_mmd(residuals, assignments, trials, kernel, scales, False, None)
    assert abs(unbiased.mean()) < 4.5 * unbiased.std() / math.sqrt(trials)
    assert (biased >= -1e-12).all()
    expected = (diagonal(kernel) - self_term(kernel, dim, DEFAULT_SCALES)) / n
    assert abs(biased.mean() - expected) < 4.5 * biased.std() / math.sqrt(trials)


@pytest.mark.parametrize("kernel", KERNELS)
def test_analytic_equals_the_sampled_statistic_in_expectation(kernel: str) -> None:
    trials, n, dim = 4_000, 6, 8
    base = torch.randn(n, dim, dtype=torch.float64) * 1.5 + 0.5
    assignments = torch.arange(trials).repeat_interleave(n)
    residuals, samples = base.repeat(trials, 1), torch.randn(trials * n, dim, dtype=torch.float64)
    arguments = (residuals, assignments, trials, kernel, list(DEFAULT_SCALES), True)
    analytic, _ = torch.ops.proto_reg.anchored_mmd(*arguments, None)
    sampled, _ = torch.ops.proto_reg.anchored_mmd(*arguments, samples)
    assert abs(sampled.mean() - analytic[0]) < 4.5 * sampled.std() / math.sqrt(trials)


def test_sampled_and_biased_is_the_two_sample_v_statistic() -> None:
    z, v, _ = random_case(12, 1, 3)
    assignments = torch.zeros(12, dtype=torch.int64)
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(5))
    x = torch.cat([z - v, samples])
    gram = torch.stack([(-torch.cdist(x, x).square() / (6 * s)).exp() for s in DEFAULT_SCALES]).mean(0)
    expected = gram[:12, :12].mean() + gram[12:, 12:].mean() - 2 * gram[:12, 12:].mean()
    loss = anchored_mmd(z, v, assignments, target="sampled", statistic="biased", generator=generator)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 40), groups=st.integers(1, 6), dim=st.integers(1, 9), seed=st.integers(0, 1000))
def test_invariances(kernel: str, weights: bool, rows: int, groups: int, dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    z, v, assignments = random_case(rows, groups, dim)
    members = torch.rand(rows, groups, dtype=torch.float64) if weights else assignments
    loss = anchored_mmd(z, v, members, kernel=kernel)
    shift = torch.randn(dim, dtype=torch.float64) * 100
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    batch, prototypes = torch.randperm(rows), torch.randperm(groups)
    renamed = members[:, prototypes] if weights else prototypes.argsort()[members]
    for same in (
        anchored_mmd(z + shift, v + shift, members, kernel=kernel),
        anchored_mmd(z @ rotation, v @ rotation, members, kernel=kernel),
        anchored_mmd(z[batch], v, members[batch], kernel=kernel),
        anchored_mmd(z, v[prototypes], renamed, kernel=kernel),
    ):
        torch.testing.assert_close(same, loss, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_offset_of_1000_in_float32(kernel: str, weights: bool) -> None:
    z, v, assignments = random_case(256, 5, 64)
    # float32 holds these coordinates exactly after the shift, so any error comes from the computation.
    z, v = (z * 512).round() / 512, (v * 512).round() / 512
    members = torch.nn.functional.one_hot(assignments, 5).float() if weights else assignments
    expected = anchored_mmd(z, v, assignments, kernel=kernel)
    loss = anchored_mmd(z.float() + 1000, v.float() + 1000, members, kernel=kernel)
    assert loss.dtype == torch.float32
    size = abs(self_term(kernel, 64, DEFAULT_SCALES))
    assert abs(loss.double() - expected) < 3e-6 * size


@pytest.mark.parametrize("members", ["assignments", "weights", "sampled"])
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(kernel: str, statistic: str, members: str) -> None:
    z, v, assignments = random_case(14, 3, 3, requires_grad=True)
    v.requires_grad_()
    mask = torch.rand(14) > 0.2
    given_members = torch.rand(14, 3, dtype=torch.float64) if members == "weights" else assignments
    target = "sampled" if members == "sampled" else "analytic"

    def loss(z: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        options = {"kernel": kernel, "statistic": statistic, "target": target, "generator": generator}
        return anchored_mmd(z, v, given_members, mask=mask, **options)

    assert torch.autograd.gradcheck(loss, (z, v))


@pytest.mark.parametrize("target", ["analytic", "sampled"])
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_clusters_of_none_and_one_are_exactly_zero(kernel: str, statistic: str, target: str) -> None:
    z = torch.randn(3, 4, requires_grad=True)
    v = torch.randn(5, 4, requires_grad=True)
    loss = anchored_mmd(z, v, torch.tensor([0, 2, 4]), kernel=kernel, statistic=statistic, target=target)
    loss.backward()
    assert loss.item() == 0
    assert not z.grad.any()
    assert not v.grad.any()


def test_weights_on_a_single_row_are_exactly_zero() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    loss = anchored_mmd(z, torch.randn(2, 4), weights)
    loss.backward()
    assert loss.item() == 0
    assert not z.grad.any()


def test_mask_leaves_rows_out_whatever_they_hold() -> None:
    z, v, assignments = random_case(60, 4, 3)
    mask = torch.rand(60) > 0.3
    z[~mask] = torch.nan
    expected = anchored_mmd(z[mask], v, assignments[mask])
    torch.testing.assert_close(anchored_mmd(z, v, assignments, mask=mask), expected)


def test_module_hands_over_its_options() -> None:
    z, v, assignments = random_case(60, 4, 3)
    options = {"kernel": "imq", "scales": (0.5, 2.0), "statistic": "biased", "reduction": "sum"}
    module = AnchoredMMDLoss(**options)
    assert module(z, v, assignments) == anchored_mmd(z, v, assignments, **options)
    z.requires_grad_()
    value, gradient = module.value_and_gradient(z, v, assignments)
    torch.testing.assert_close(gradient, torch.autograd.grad(module(z, v, assignments), z)[0])
    assert not value.requires_grad
    assert not gradient.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_float32_also_inside_autocast(dtype: torch.dtype) -> None:
    z, v, assignments = random_case(64, 4, 16)
    z, v = z.to(dtype), v.to(dtype)
    expected = anchored_mmd(z.double(), v.double(), assignments)
    with torch.autocast("cpu", torch.bfloat16):
        loss = anchored_mmd(z, v, assignments)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", [False, True])
def test_opcheck(samples: bool) -> None:
    z, v, assignments = random_case(30, 4, 3)
    draws = torch.randn_like(z) if samples else None
    for grad in (False, True):
        residuals = (z - v[assignments]).requires_grad_(grad)
        arguments = (residuals, assignments, 4, "gaussian", [0.5, 1.0], True, draws)
        torch.library.opcheck(torch.ops.proto_reg.anchored_mmd.default, arguments)
        arguments = (z.clone().requires_grad_(grad), v, torch.rand(30, 4).double(), "imq", [1.0], False, True)
        torch.library.opcheck(torch.ops.proto_reg.weighted_mmd.default, arguments)


def test_non_contiguous_and_poisoned_memory() -> None:
    z, v, assignments = random_case(40, 4, 6)
    expected = anchored_mmd(z, v, assignments)
    torch.use_deterministic_algorithms(True, warn_only=True)  # empty() returns tensors of NaN from here on
    try:
        assert anchored_mmd(z.T.contiguous().T, v.T.contiguous().T, assignments) == expected
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_features_estimate_the_exact_statistic(statistic: str, reduction: str) -> None:
    torch.manual_seed(0)
    z, v, assignments = random_case(200, 6, 4, requires_grad=True)
    assignments[-1] = -1
    options = {"statistic": statistic, "reduction": reduction, "mask": torch.rand(200) > 0.2}
    exact = anchored_mmd(z, v, assignments, **options)
    (expected,) = torch.autograd.grad(exact, z)
    losses = [anchored_mmd(z, v, assignments, features=4000, seed=seed, **options) for seed in range(20)]
    values = torch.stack(losses).detach()
    error = values.std() / 20**0.5
    assert abs(values.mean() - exact) < 4 * error  # unbiased
    assert error < 0.01 * exact  # and close, with 80,000 frequencies
    gradient = sum(torch.autograd.grad(loss, z)[0] for loss in losses) / 20
    assert (gradient - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("statistic", STATISTICS)
def test_features_follow_their_formula_and_its_gradient(statistic: str) -> None:
    z, v, assignments = random_case(50, 4, 3, requires_grad=True)
    assignments[1] = 3  # the third cluster may hold one latent, which does not count
    w, share = frequencies(z, 20, (0.5, 2.0, 1.0), 7)
    assert share.sum() == pytest.approx(1) and w.shape == (20, 3)
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(4):
        r = (z - v[k])[assignments == k]
        if (n := len(r)) > 1:
            phi = torch.exp(1j * (r @ w.T)).mean(0)
            c = (-0.5 * w.square().sum(1)).exp()
            squared = (n * phi.abs().square() - 1) / (n - 1) if statistic == "unbiased" else phi.abs().square()
            expected = expected + n / 50 * ((squared - 2 * phi.real * c + c * c) * share).sum()
    loss = anchored_mmd(z, v, assignments, features=20, seed=7, scales=(0.5, 2.0, 1.0), statistic=statistic)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in (loss, expected)))


def test_frequencies_are_normal_and_a_function_of_the_seed() -> None:
    z = torch.zeros(1, 8)
    w, _ = frequencies(z, 20_000, (1.0,), 3)
    u = w * 8**0.5
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        assert u.pow(power).mean() == pytest.approx(moment, abs=0.3 if power == 6 else 0.05)
    assert (torch.corrcoef(u.T) - torch.eye(8)).abs().max() < 0.03
    assert torch.equal(w, frequencies(z, 20_000, (1.0,), 3)[0])
    assert (w - frequencies(z, 20_000, (1.0,), 4)[0]).abs().mean() > 0.2


def test_features_say_what_they_cannot_do() -> None:
    z, v, assignments = random_case(20, 3, 2)
    for options, message in (
        ({"kernel": "imq"}, "features: expected None with kernel='imq'"),
        ({"target": "sampled"}, "features: expected None with kernel='gaussian' and target='sampled'"),
    ):
        with pytest.raises(ValueError, match=message):
            anchored_mmd(z, v, assignments, features=20, **options)
    with pytest.raises(ValueError, match="features: expected None with"):
        anchored_mmd(z, v, torch.rand(20, 3, dtype=torch.float64), features=20)
    with pytest.raises(ValueError, match="features: expected an int >= 6, got 5"):
        AnchoredMMDLoss(features=5)
