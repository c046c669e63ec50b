"""The fused operator: every backend computes loss and gradient from the scores in one pass."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import cosines

from proto_reg import SinkhornAssigner
from proto_reg.functional import prototype_cross_entropy, sinkhorn, sinkhorn_cross_entropy
from proto_reg.kernels.sinkhorn_reference import sinkhorn_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = [(256, 30), (1, 1), (3, 70), (37, 13), (300, 5), (700, 61)]


def expected(scores: torch.Tensor, temperature: float = 0.1, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient in float64, by autograd. Plain torch computes the codes."""
    wide = scores.detach().double().requires_grad_()
    codes = sinkhorn(wide, **options)
    loss = prototype_cross_entropy(wide, codes, temperature, mask=options.get("mask"))
    loss.backward()
    return loss.detach(), wide.grad


@pytest.mark.parametrize("scale", [1, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_against_float64(shape: tuple[int, int], scale: float) -> None:
    scores = (scale * cosines(*shape)).requires_grad_()
    loss, codes = sinkhorn_cross_entropy(scores, return_codes=True)
    (3 * loss).backward()
    loss64, gradient64 = expected(scores)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-6, atol=1e-6)
    # Before the division by B, the entries of (p - q) / tau are between -10 and 10, because 1 / tau = 10.
    error = (scores.grad.double() / 3 - gradient64).abs().max() * len(scores) / 10
    assert error < 1e-6, error
    assert torch.equal(codes, sinkhorn(scores))
    assert not codes.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    scores = cosines(64, 19).to(dtype).requires_grad_()
    loss = sinkhorn_cross_entropy(scores)
    loss.backward()
    loss64, gradient64 = expected(scores)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-6, atol=1e-6)
    largest = gradient64.abs().max()
    assert (scores.grad.double() - gradient64).abs().max() < largest * torch.finfo(dtype).eps


def test_masked_rows_reach_nothing() -> None:
    scores = cosines(40, 7)
    mask = torch.rand(40) > 0.3
    loss64, gradient64 = expected(scores, mask=mask)
    scores[~mask] = torch.nan
    scores.requires_grad_()
    loss = sinkhorn_cross_entropy(scores, mask=mask)
    loss.backward()
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.grad.double(), torch.where(mask[:, None], gradient64, 0.0), rtol=0, atol=1e-6)
    nothing = sinkhorn_cross_entropy(scores, mask=torch.zeros(40, dtype=torch.bool))
    assert nothing == 0


def test_isolated_rows_and_dead_prototypes() -> None:
    scores = cosines(40, 7)
    others = torch.arange(40) != 3
    loss, codes = sinkhorn_cross_entropy(scores[others][:, :6], return_codes=True)
    scores[3, 2] = torch.nan
    scores[:, 6] = -torch.inf
    scores.requires_grad_()
    isolated, isolated_codes = sinkhorn_cross_entropy(scores, nan_policy="isolate", return_codes=True)
    isolated.backward()
    torch.testing.assert_close(isolated, loss)
    torch.testing.assert_close(isolated_codes[others][:, :6], codes, rtol=0, atol=1e-6)
    assert isolated_codes[3].isnan().all()
    assert scores.grad.isfinite().all()
    assert not scores.grad[3].any()
    assert sinkhorn_cross_entropy(scores).isnan()


def test_weights_and_marginals() -> None:
    scores = cosines(60, 8).requires_grad_()
    weights, marginals = torch.randint(0, 3, (60,)).float(), torch.rand(8).softmax(0)
    repeated = torch.cat([scores[i].detach().expand(int(w), -1) for i, w in enumerate(weights)])
    loss = sinkhorn_cross_entropy(scores, weights=weights, marginals=marginals)
    loss.backward()
    torch.testing.assert_close(loss.detach(), sinkhorn_cross_entropy(repeated, marginals=marginals))
    plain = sinkhorn_cross_entropy_reference(
        scores.detach().double(), marginals.double(), weights, 0.05, 3, None, False, 0.1, False
    )
    torch.testing.assert_close(scores.grad.double(), plain[1], rtol=0, atol=1e-7)


def test_layouts_and_poisoned_memory() -> None:
    scores = cosines(34, 10)
    straight = sinkhorn_cross_entropy(scores[::2, 1::3].contiguous())
    torch.use_deterministic_algorithms(True)  # so empty() returns tensors of NaN
    try:
        torch.testing.assert_close(sinkhorn_cross_entropy(scores[::2, 1::3]), straight)
        torch.testing.assert_close(sinkhorn_cross_entropy(scores.T.contiguous().T), sinkhorn_cross_entropy(scores))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_fullgraph() -> None:
    scores = cosines(33, 7).requires_grad_()
    loss = torch.compile(sinkhorn_cross_entropy, fullgraph=True)(scores)
    loss.backward()
    loss64, gradient64 = expected(scores)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.grad.double(), gradient64, rtol=0, atol=1e-6)


def test_a_second_derivative_raises() -> None:
    scores = cosines(9, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(sinkhorn_cross_entropy(scores), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        gradient.sum().backward()


def test_a_subclass_assigns_by_its_own_codes() -> None:
    class Nearest(SinkhornAssigner):
        def forward(self, scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).to(scores)

    scores = cosines(20, 4).requires_grad_()
    loss, gradient, codes = Nearest().cross_entropy_and_gradient(scores.detach(), 0.1)
    expected = prototype_cross_entropy(scores, codes, 0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0])


OPCHECK = """
import torch
from proto_reg.kernels import backends
torch.manual_seed(0)
for dtype in DTYPES:
    scores = torch.randn(33, 7).tanh().to(dtype)
    assert backends.choose("auto", scores) == BACKEND
    shares = torch.full((7,), 1 / 7)
    for options in ((None, None, 0.05, 3, None, False), (shares, torch.rand(33), 0.1, 9, 1e-3, True)):
        for requires_grad in (False, True):
            given = scores.clone().requires_grad_(requires_grad)
            torch.library.opcheck(torch.ops.proto_reg.sinkhorn.default, (given, *options))
            marginals, weights, *others = options
            reordered = (given, *others[:2], marginals, weights, *others[2:])
            torch.library.opcheck(torch.ops.proto_reg.sinkhorn_codes.default, reordered)
            torch.library.opcheck(torch.ops.proto_reg.sinkhorn_codes.default, (given, 0.05, 3))
            torch.library.opcheck(torch.ops.proto_reg.sinkhorn.default, (given[None], *[None] * 2, *options[2:]))
            for with_codes in (False, True):
                torch.library.opcheck(
                    torch.ops.proto_reg.sinkhorn_cross_entropy.default, (given, *options, 0.1, with_codes)
                )
        torch.library.opcheck(torch.ops.proto_reg.sinkhorn_out.default, (scores, *options, torch.empty_like(scores)))
"""


@pytest.mark.slow
def test_opcheck(backend: str, request: pytest.FixtureRequest) -> None:
    """The test runs in its own process. That process loads what the test says, and nothing else."""
    dtypes = "(torch.float32, torch.bfloat16)" if backend == "cpu" else "(torch.float64, torch.float32, torch.bfloat16)"
    code = OPCHECK.replace("DTYPES", dtypes).replace("BACKEND", repr(backend))
    environment = dict(os.environ, PROTO_REG_BACKEND="auto" if backend == "cpu" else "torch")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
