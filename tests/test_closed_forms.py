"""The expectations of the kernels, against Monte Carlo in float64 and special functions."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from conftest import kernel_value

from proto_reg.functional.mmd import DEFAULT_SCALES
from proto_reg.kernels import closed_forms

DIMS = (2, 64, 256)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kernel", closed_forms.KERNELS)
@pytest.mark.parametrize("distance", [0.0, 1.0, 3.0])
def test_attraction_is_the_expectation_over_the_target(kernel: str, dim: int, distance: float) -> None:
    y = torch.randn(50_000, dim, dtype=torch.float64)
    r = torch.full((dim,), distance, dtype=torch.float64)
    draws = kernel_value(kernel, (y - r).square().sum(1), dim, DEFAULT_SCALES)
    value, _ = closed_forms.attraction(kernel, r.square().sum()[None], dim, DEFAULT_SCALES)
    assert abs(value.item() - draws.mean().item()) < 4.5 * draws.std().item() / math.sqrt(len(draws))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kernel", closed_forms.KERNELS)
def test_self_term_is_the_expectation_over_pairs(kernel: str, dim: int) -> None:
    y, other = torch.randn(2, 50_000, dim, dtype=torch.float64)
    draws = kernel_value(kernel, (y - other).square().sum(1), dim, DEFAULT_SCALES)
    value = closed_forms.self_term(kernel, dim, DEFAULT_SCALES)
    assert abs(value - draws.mean().item()) < 4.5 * draws.std().item() / math.sqrt(len(draws))


@pytest.mark.parametrize("dim", (1, *DIMS))
@pytest.mark.parametrize("kernel", closed_forms.KERNELS)
def test_slopes_are_derivatives(kernel: str, dim: int) -> None:
    squared = torch.tensor([0.3, 1.0, 2.0, 50.0], dtype=torch.float64) * dim
    step = 1e-4 * squared
    for function in (closed_forms.attraction, closed_forms.pair):
        _, slope = function(kernel, squared, dim, DEFAULT_SCALES)
        up, down = (function(kernel, squared + s, dim, DEFAULT_SCALES)[0] for s in (step, -step))
        torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dim", (1, *DIMS))
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e4])
def test_energy_is_the_hypergeometric_function(dim: int, ratio: float) -> None:
    """E|r - y| = sqrt(2) Gamma((D+1)/2) / Gamma(D/2) 1F1(-1/2; D/2; -|r|^2/2)."""
    squared = ratio * dim
    gamma = math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))
    exact = -math.sqrt(2) * gamma * float(mpmath.hyp1f1(-0.5, dim / 2, -squared / 2))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-6)):
        value, _ = closed_forms.attraction("energy", torch.tensor([squared], dtype=dtype), dim, DEFAULT_SCALES)
        assert abs(value.item() / exact - 1) < tolerance


@pytest.mark.parametrize("dim", (1, *DIMS))
def test_imq_is_the_exponential_integral(dim: int) -> None:
    """b = (C/4) e^{C/4} E_{D/2}(C/4) = int e^{-x} (1 + 4x/C)^{-D/2} dx; mpmath's own expint is wrong at D = 256."""
    for scale in DEFAULT_SCALES:
        quarter = 2 * dim * scale / 4
        with mpmath.workdps(30):
            pieces = [0, 0.5, 1, 3, 10, 30, 100]
            exact = float(mpmath.quad(lambda x, q=quarter: mpmath.exp(-x) * (1 + x / q) ** (-dim / 2), pieces))
        assert abs(closed_forms.self_term("imq", dim, (scale,)) - exact) < 1e-9


@pytest.mark.parametrize("dim", [2, 64])
@pytest.mark.parametrize("n", [4, 12])
def test_null_variance_of_the_averaged_gaussian_kernel(dim: int, n: int) -> None:
    trials = 4_000
    residuals = torch.randn(trials * n, dim, dtype=torch.float64)
    groups = torch.arange(trials).repeat_interleave(n)
    values, _ = torch.ops.proto_reg.anchored_mmd(
        residuals, groups, trials, "gaussian", list(DEFAULT_SCALES), True, None
    )
    expected = closed_forms.gaussian_null_variance(torch.tensor(float(n)), dim, DEFAULT_SCALES).item()
    kurtosis = ((values - values.mean()) / values.std()).pow(4).mean().item()
    error = math.sqrt((kurtosis - 1) / trials)  # the relative standard error of a sample variance
    assert abs(values.var().item() / expected - 1) < 5 * error
    assert abs(values.mean().item()) < 4.5 * math.sqrt(expected / trials)
