"""The options of the Sinkhorn operator, with every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import cosines, log_sinkhorn

from proto_reg import SinkhornAssigner
from proto_reg.functional import sinkhorn, sinkhorn_cross_entropy

pytestmark = pytest.mark.usefixtures("backend")


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Check two results. Each may be 1e-6 away from the exact one."""
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("scale", [1, 30])
def test_a_weight_of_two_is_the_row_twice(scale: float) -> None:
    scores = scale * cosines(40, 6)
    weights = torch.randint(0, 4, (40,)).float()
    repeated = torch.cat([scores[i].expand(int(w), -1) for i, w in enumerate(weights)])
    codes = sinkhorn(scores, weights=weights)
    twice = sinkhorn(repeated)
    first = (weights.cumsum(0) - weights).long()
    close(codes[weights > 0], twice[first[weights > 0]])
    close(codes.sum(1), torch.ones(40))
    close(sinkhorn(scores, weights=weights, mask=weights > 1), sinkhorn(scores, weights=weights * (weights > 1)))


@pytest.mark.parametrize("factor", [1e-40, 1e-25, 1e-12, 1e9, 1e18, 1e38])
def test_only_ratios_of_weights_matter(factor: float) -> None:
    for scale in (1, 30):
        scores = scale * cosines(300, 20)
        weights = torch.rand(300) + 0.5
        close(sinkhorn(scores, weights=(weights * factor).float()), sinkhorn(scores, weights=weights))
        mask = torch.arange(300) > 0
        beside = torch.where(mask, (weights * factor).float(), 3e38)
        close(sinkhorn(scores, weights=beside, mask=mask)[1:], sinkhorn(scores[1:], weights=weights[1:]))


def test_a_low_first_row_whose_best_prototype_takes_no_part() -> None:
    scores = torch.full((20_000, 3), 1.0)
    scores[0] = -1
    scores[1, 1:] = -1
    close(sinkhorn(scores, marginals=[0.0, 0.5, 0.5])[0], torch.tensor([0, 0.5, 0.5]))
    scores = torch.full((300, 8), 2.0)
    scores[0] = 0
    scores[1, 1:] = 0
    allowed = torch.arange(8) > 0
    leaf = scores.clone().requires_grad_()
    sinkhorn_cross_entropy(leaf, 0.045, prototype_mask=allowed).backward()
    assert leaf.grad.isfinite().all()
    close(sinkhorn(scores, 0.045, prototype_mask=allowed)[:, 1:], torch.full((300, 7), 1 / 7))


def test_extreme_epsilons() -> None:
    assert sinkhorn(torch.full((9, 4), 0.5), 1e-40).isfinite().all()
    largest = torch.finfo(torch.float32).max
    assert sinkhorn(torch.tensor([[largest, -largest], [-largest, largest]]), 1e38).isfinite().all()


@pytest.mark.parametrize("scale", [1, 30])
def test_a_mask_of_prototypes_is_the_problem_without_them(scale: float) -> None:
    scores = scale * cosines(50, 9)
    allowed = torch.rand(9) > 0.4
    codes, potentials = sinkhorn(scores, prototype_mask=allowed, return_potentials=True)
    close(codes[:, allowed], sinkhorn(scores[:, allowed]))
    assert not codes[:, ~allowed].any()
    assert (potentials[~allowed] == -torch.inf).all()
    shares = torch.rand(9).softmax(0)
    with_shares = sinkhorn(scores, marginals=shares, prototype_mask=allowed)
    close(with_shares[:, allowed], sinkhorn(scores[:, allowed], marginals=shares[allowed] / shares[allowed].sum()))
    with pytest.raises(ValueError, match="prototype_mask: expected at least one prototype"):
        sinkhorn(scores, prototype_mask=torch.zeros(9, dtype=torch.bool))


@pytest.mark.parametrize("scale", [1, 30])
def test_groups_are_problems_of_their_own(scale: float) -> None:
    scores = scale * torch.stack([cosines(33, 7) for _ in range(3)])
    marginals = torch.rand(3, 7).softmax(1)
    weights = torch.rand(3, 33)
    allowed = torch.rand(3, 7) > 0.2
    codes, potentials = sinkhorn(scores, return_potentials=True)
    assert potentials.shape == (3, 7)
    several = sinkhorn(scores, 0.1, 50, tol=1e-3, marginals=marginals, weights=weights, prototype_mask=allowed)
    for g in range(3):
        close(codes[g], sinkhorn(scores[g]))
        options = {"marginals": marginals[g], "weights": weights[g], "prototype_mask": allowed[g]}
        close(several[g], sinkhorn(scores[g], 0.1, 50, tol=1e-3, **options))
    close(sinkhorn(scores, marginals=marginals[0])[1], sinkhorn(scores[1], marginals=marginals[0]))
    close(SinkhornAssigner()(scores), codes)


def test_leading_axes_are_groups() -> None:
    scores = torch.stack([cosines(33, 7) for _ in range(6)]).view(2, 3, 33, 7)
    per_group = {
        "marginals": torch.rand(2, 3, 7).softmax(-1),
        "weights": torch.rand(2, 3, 33) + 0.1,
        "mask": torch.rand(2, 3, 33) > 0.2,
        "prototype_mask": torch.rand(2, 3, 7) > 0.2,
    }
    shared = {"marginals": torch.rand(7).softmax(0), "prototype_mask": torch.rand(7) > 0.2, "hard": True}
    out = torch.empty_like(scores)
    for options in ({}, per_group, shared, {"nan_policy": "isolate", "tol": 1e-3}, {"differentiable": True}):
        codes, potentials = sinkhorn(scores, 0.1, 5, return_potentials=True, **options)
        assert codes.shape == scores.shape
        assert potentials.shape == (2, 3, 7)
        assert sinkhorn(scores, 0.1, 5, **options).shape == scores.shape
        if "differentiable" not in options:
            assert sinkhorn(scores, 0.1, 5, out=out, **options) is out
            close(out, codes)
        for i in range(2):
            for j in range(3):
                own = {k: v[i, j] if isinstance(v, torch.Tensor) and v.ndim > 1 else v for k, v in options.items()}
                alone, g = sinkhorn(scores[i, j], 0.1, 5, return_potentials=True, **own)
                close(codes[i, j], alone)
                torch.testing.assert_close(potentials[i, j], g, rtol=1e-5, atol=1e-5)
    close(SinkhornAssigner()(scores), sinkhorn(scores))
    close(sinkhorn(scores.transpose(0, 1)), sinkhorn(scores).transpose(0, 1))
    wide = scores.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sinkhorn(s[:, :, :4], 0.3, 2, differentiable=True), wide)
    with pytest.raises(ValueError, match=r"weights: expected shape \(2, 3, 33\)"):
        sinkhorn(scores, weights=torch.ones(33))
    with pytest.raises(ValueError, match=r"scores: expected \(B, K\).*Take the groups one by one"):
        sinkhorn_cross_entropy(scores)


def test_hard_codes() -> None:
    scores = cosines(64, 6)
    codes = sinkhorn(scores)
    hard = sinkhorn(scores, hard=True)
    assert torch.equal(hard.sum(1), torch.ones(64))
    assert torch.equal(hard.argmax(1), codes.argmax(1))
    assert hard.dtype == scores.dtype


def test_hard_codes_of_nan_are_nan() -> None:
    scores = cosines(6, 3)
    scores[2, 1] = torch.nan
    assert sinkhorn(scores, hard=True).isnan().all()
    isolated = sinkhorn(scores, hard=True, nan_policy="isolate")
    assert isolated[2].isnan().all()
    assert (isolated[[0, 1, 3, 4, 5]].sum(1) == 1).all()


def test_weights_are_as_precise_as_scores() -> None:
    scores, weights = cosines(30, 4, dtype=torch.float64), torch.rand(30, dtype=torch.float64)
    codes = sinkhorn(scores, 0.05, 1, weights=weights)
    mass = (weights[:, None] * (scores / 0.05).exp()).sum(0)
    torch.testing.assert_close(codes, ((scores / 0.05).exp() / mass) / ((scores / 0.05).exp() / mass).sum(1)[:, None])


def test_export_keeps_the_batch_dynamic() -> None:
    class Assign(torch.nn.Module):
        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            return sinkhorn(scores, backend="torch")

    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Assign(), (cosines(64, 10),), dynamic_shapes=dynamic)
    scores = cosines(33, 10)
    close(program.module()(scores), sinkhorn(scores))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_out_receives_the_codes(dtype: torch.dtype) -> None:
    scores = cosines(64, 6).to(dtype)
    out = torch.full_like(scores, torch.nan)
    codes, potentials = sinkhorn(scores, out=out, return_potentials=True)
    assert codes is out
    assert torch.equal(out, sinkhorn(scores))
    assert torch.equal(potentials, sinkhorn(scores, return_potentials=True)[1])
    assert torch.equal(sinkhorn(scores, out=out, hard=True), sinkhorn(scores, hard=True))
    for wrong in (torch.empty(64, 5), torch.empty(6, 64, dtype=dtype).T, torch.empty(64, 6, dtype=torch.int64), "out"):
        with pytest.raises(ValueError, match="out: expected a contiguous tensor like scores"):
            sinkhorn(scores, out=wrong)
    with pytest.raises(ValueError, match="memory of its own"):
        sinkhorn(scores, out=scores)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_out_receives_the_codes_of_a_compiled_call(dtype: torch.dtype) -> None:
    scores = cosines(64, 6).to(dtype)
    compiled = torch.compile(lambda s, o: sinkhorn(s, out=o), fullgraph=True)
    torch.testing.assert_close(compiled(scores, torch.empty_like(scores)), sinkhorn(scores))


def test_differentiable_codes() -> None:
    scores = cosines(9, 4, dtype=torch.float64).requires_grad_()
    weights = torch.rand(9)
    marginals = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)

    def codes(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sinkhorn(
            s, 0.3, 4, marginals=marginals, weights=weights, differentiable=True, return_potentials=True, tol=1e-9
        )

    assert torch.autograd.gradcheck(codes, (scores,))
    assert torch.autograd.gradcheck(lambda s: sinkhorn(100 * s, 0.3, differentiable=True), (scores,))
    close(codes(scores)[0].detach(), sinkhorn(scores, 0.3, 4, marginals=marginals, weights=weights))
    with pytest.raises(ValueError, match="differentiable: expected False"):
        sinkhorn(scores, differentiable=True, hard=True)
    with pytest.raises(ValueError, match=r"differentiable: expected False, True or 'implicit', got 'unrolled'"):
        sinkhorn(scores, differentiable="unrolled")


@pytest.mark.parametrize("rows", [40, 700])
@pytest.mark.parametrize("scale", [1, 30])
def test_marginals_and_tol_against_float64(rows: int, scale: float) -> None:
    scores = scale * cosines(rows, 60)
    marginals = torch.rand(60).softmax(0)
    marginals[3] = 0
    marginals = marginals / marginals.sum()
    for num_iters in (1, 3, 40):
        codes = sinkhorn(scores, 0.05, num_iters, marginals=marginals)
        error = (codes.double() - log_sinkhorn(scores, 0.05, num_iters, marginals)).abs().max()
        assert error < (2e-6 if scale == 1 else 3e-6), error  # the logits go to 600, the potentials to 47
    loose, tight = (sinkhorn(scores, 0.05, 200, tol=tol, marginals=marginals) for tol in (0.3, 0.01))
    met = marginals > 0
    for codes, tol in ((loose, 0.3), (tight, 0.01)):
        assert (codes.mean(0)[met] / marginals[met] - 1).abs().max() < tol + 1e-4 or scale > 1
    assert (loose - tight).abs().max() > 1e-5


def test_bad_weights() -> None:
    scores = cosines(5, 3)
    with pytest.raises(ValueError, match="weights: expected finite numbers >= 0"):
        sinkhorn(scores, weights=torch.tensor([1.0, 1, 1, 1, -1]))
    with pytest.raises(TypeError, match="prototype_mask: expected a boolean tensor"):
        sinkhorn(scores, prototype_mask=[True, False, True])
    with pytest.raises(ValueError, match=r"weights: expected shape \(5,\)"):
        sinkhorn(scores, weights=torch.ones(4))
    with pytest.raises(TypeError, match="weights: expected a floating-point tensor"):
        sinkhorn(scores, weights=torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"scores: expected shape \(B, K\).*one row of K scores for each latent"):
        sinkhorn(torch.randn(5))
