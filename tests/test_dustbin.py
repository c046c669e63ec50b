"""Matching with a dustbin, against SuperGlue's method written as a float64 loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from proto_reg.functional import sinkhorn_with_dustbin

pytestmark = pytest.mark.usefixtures("backend")


def loop(scores: Tensor, dustbin: Tensor | float, num_iters: int, epsilon: float = 1.0) -> Tensor:
    """Plan (B + 1, K + 1): rows and columns of exp(S / eps) are scaled in turns to masses 1, and K or B at the end."""
    rows, columns = scores.shape
    cells = [
        [scores[i, j] if i < rows and j < columns else dustbin for j in range(columns + 1)] for i in range(rows + 1)
    ]
    plan = torch.stack([torch.stack([torch.as_tensor(cell).double() for cell in line]) for line in cells])
    plan = ((plan - plan.max()) / epsilon).exp()
    masses = torch.tensor([1.0] * rows + [columns], dtype=torch.float64)
    plan = plan * masses[:, None]  # as sinkhorn starts under weights
    for _ in range(num_iters):
        plan = plan / plan.sum(0) * torch.tensor([1.0] * columns + [rows], dtype=torch.float64)
        plan = plan / plan.sum(1, keepdim=True) * masses[:, None]
    return plan


@pytest.mark.parametrize("num_iters", [1, 5, 100])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 1), (20, 31)])
def test_is_the_loop(shape: tuple[int, int], num_iters: int) -> None:
    scores = 2 * torch.randn(shape)
    for dustbin in (-3.0, 1.0, torch.tensor(1.0)):
        plan = sinkhorn_with_dustbin(scores, dustbin, num_iters=num_iters)
        torch.testing.assert_close(plan.double(), loop(scores, dustbin, num_iters), rtol=1e-5, atol=1e-5)
    plan = sinkhorn_with_dustbin(scores.double(), 1.0, 0.5, num_iters)
    torch.testing.assert_close(plan, loop(scores.double(), 1.0, num_iters, 0.5), rtol=1e-11, atol=1e-12)


def test_ends_where_superglue_does() -> None:
    """Its iterations begin at v = 0 and end with the columns. Both have the same limit."""
    scores = 2 * torch.randn(20, 31, dtype=torch.float64)
    bordered = torch.full((21, 32), 1.0, dtype=torch.float64)
    bordered[:20, :31] = scores
    rows, columns = torch.ones(21).double(), torch.ones(32).double()
    rows[-1], columns[-1] = 31, 20
    v = torch.zeros(32, dtype=torch.float64)
    for _ in range(100):
        u = rows.log() - (bordered + v).logsumexp(1)
        v = columns.log() - (bordered + u[:, None]).logsumexp(0)
    plan = sinkhorn_with_dustbin(scores, 1.0)
    torch.testing.assert_close(plan, (bordered + u[:, None] + v).exp(), rtol=0, atol=1e-4)
    torch.testing.assert_close(plan.sum(1), rows)
    torch.testing.assert_close(plan.sum(0), columns, rtol=0, atol=1e-4)


def test_gradients_reach_the_dustbin_score() -> None:
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    dustbin = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, d: sinkhorn_with_dustbin(s, d, num_iters=6), (scores, dustbin))
    ours = torch.autograd.grad(sinkhorn_with_dustbin(scores, dustbin, num_iters=6)[0, 1].log(), (scores, dustbin))
    theirs = torch.autograd.grad(loop(scores, dustbin, 6)[0, 1].log(), (scores, dustbin))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert not sinkhorn_with_dustbin(scores, dustbin).requires_grad
    assert not sinkhorn_with_dustbin(scores.detach(), 1.0).requires_grad


def test_a_learned_dustbin_takes_what_has_no_partner() -> None:
    """Five rows match, the others are noise: maximum likelihood moves the score until they go to the dustbin."""
    scores = torch.full((8, 7), -1.0) + 0.1 * torch.randn(8, 7)
    scores[range(5), range(5)] = 3.0
    dustbin = torch.tensor(-5.0, requires_grad=True)
    optimizer = torch.optim.Adam([dustbin], lr=0.3)
    for _ in range(60):
        plan = sinkhorn_with_dustbin(scores, dustbin, num_iters=20)
        loss = -plan[range(5), range(5)].log().mean() - plan[5:8, -1].log().mean() - plan[-1, 5:7].log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert dustbin.item() > -1
    assert (plan[5:8].argmax(1) == 7).all()
    assert (plan[:5, :-1].argmax(1) == torch.arange(5)).all()


def test_problems_of_different_sizes_share_a_batch() -> None:
    scores = torch.randn(2, 3, 6, 5)
    row_mask, column_mask = torch.rand(2, 3, 6) > 0.3, torch.rand(2, 3, 5) > 0.3
    row_mask[..., 0] = column_mask[..., 0] = True
    dustbins = torch.randn(3)
    broken = torch.where(row_mask[..., None] & column_mask[..., None, :], scores, torch.nan).requires_grad_()
    plans = sinkhorn_with_dustbin(broken, dustbins, num_iters=30, row_mask=row_mask, column_mask=column_mask)
    assert plans.shape == (2, 3, 7, 6)
    for i in range(2):
        for j in range(3):
            kept = (torch.cat([mask[i, j], torch.ones(1) > 0]) for mask in (row_mask, column_mask))
            rows, columns = (keep.nonzero().flatten() for keep in kept)
            alone = sinkhorn_with_dustbin(scores[i, j][row_mask[i, j]][:, column_mask[i, j]], dustbins[j], num_iters=30)
            torch.testing.assert_close(plans[i, j][rows][:, columns], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(plans[i, j].sum(), alone.sum())
    plans.square().sum().backward()
    assert broken.grad.isfinite().all()


def test_one_side_may_be_empty() -> None:
    plan = sinkhorn_with_dustbin(torch.empty(0, 3), 1.0)
    torch.testing.assert_close(plan, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    plan = sinkhorn_with_dustbin(torch.empty(2, 0), 1.0)
    torch.testing.assert_close(plan, torch.tensor([[1.0], [1.0], [0.0]]))


def test_wrong_arguments() -> None:
    scores = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"dustbin_score: expected a number or a tensor that broadcasts to \(2,\)"):
        sinkhorn_with_dustbin(scores, torch.zeros(5))
    with pytest.raises(TypeError, match="dustbin_score: expected a number"):
        sinkhorn_with_dustbin(scores, "low")
    with pytest.raises(ValueError, match=r"row_mask: expected shape \(2, 4\)"):
        sinkhorn_with_dustbin(scores, 1.0, row_mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"scores: expected shape \(\.\.\., B, K\)"):
        sinkhorn_with_dustbin(torch.randn(3), 1.0)
