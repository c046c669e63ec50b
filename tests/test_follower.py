"""The operator that moves prototypes. The tests of the layer show its effect in training."""

from __future__ import annotations

import pytest
import torch

from proto_reg.follower import PrototypeFollower


def test_opcheck() -> None:
    arguments = (torch.randn(3, 2), torch.randn(3, 2), torch.tensor([2.0, 0.0, 1.0]), torch.randn(3, 2), 0.1)
    torch.library.opcheck(torch.ops.proto_reg.follow.default, arguments)


def test_latents_that_do_not_count_are_not_remembered() -> None:
    v = torch.zeros(3, 2)
    follower = PrototypeFollower(v, 0.5)
    z = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [torch.inf, 0.0], [5.0, 6.0], [7.0, 8.0]])
    follower.observe(z, torch.tensor([0, 0, 1, 1, 0]), v, torch.tensor([True, True, True, True, False]))
    weights = torch.tensor([(1 + 5 / 2) ** -2, (1 + 61 / 2) ** -2, 0])
    torch.testing.assert_close(follower.weight_sums, weights)
    torch.testing.assert_close(follower.sums, weights[:, None] * torch.tensor([[1.0, 2.0], [5.0, 6.0], [0.0, 0.0]]))


def test_a_rate_of_zero_keeps_no_state() -> None:
    assert PrototypeFollower(torch.zeros(3, 2), 0.0).state_dict() == {}


def test_state_stays_wide_enough_to_count() -> None:
    v = torch.nn.Parameter(torch.randn(3, 2))
    follower = PrototypeFollower(v, 0.5).bfloat16()
    assert {buffer.dtype for buffer in follower.buffers()} == {torch.float32}
    assert {buffer.dtype for buffer in follower.double().buffers()} == {torch.float64}


def test_prototypes_that_nobody_touched_are_not_written_to() -> None:
    v = torch.nn.Parameter(torch.randn(3, 2))
    follower = PrototypeFollower(v, 0.5)
    follower.move(v)
    version = v._version
    follower.observe(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]), v.detach(), torch.tensor(True))
    follower.move(v)
    assert v._version == version
    with torch.no_grad():
        v += 1
    follower.move(v)
    assert follower.weight_sums.tolist() == [0, 0, 0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_prototypes_follow_whatever_optimizer_moves_them(optimizer: type, fused: bool) -> None:
    v = torch.nn.Parameter(torch.zeros(3, 2))
    follower, steps = PrototypeFollower(v, 0.5), optimizer([v], lr=1.0, fused=fused)
    follower.move(v)
    follower.observe(torch.full((3, 2), 8.0), torch.arange(3), v.detach(), torch.tensor(True))
    v.grad = torch.ones(3, 2)
    steps.step()  # to -1; the mean of 8 is now 9 away
    follower.move(v)
    assert torch.allclose(v, torch.full((3, 2), 3.5))


@pytest.mark.parametrize("operator", ["follow", "follow_float32"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_single_prototype_waits_for_no_optimizer(operator: str, count: int) -> None:
    v, sums, weight_sums = torch.zeros(count, 2), torch.full((count, 2), 8.0), torch.full((count,), 2.0)
    getattr(torch.ops.proto_reg, operator)(v, sums, weight_sums, v.clone(), 0.5)
    assert v.unique().tolist() == [2.0 if count == 1 else 0.0]


def test_a_prototype_goes_to_one_of_two_kinds_and_not_between_them() -> None:
    """Two thirds of its latents are around -4, one third around 4. Their mean, near -1.3, is like neither kind."""
    torch.manual_seed(0)
    z = torch.cat([torch.randn(200, 2) - 4, torch.randn(100, 2) + 4])
    v = torch.nn.Parameter(z.mean(0, keepdim=True))
    follower = PrototypeFollower(v, 0.5)
    for _ in range(30):
        follower.observe(z, torch.zeros(300, dtype=torch.int64), v.detach())
        with torch.no_grad():
            v += 1e-4  # as an optimizer does
        follower.move(v)
    assert (v + 4).abs().max() < 0.3
