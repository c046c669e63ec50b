"""The weights and the temperature over the steps of a training."""

from __future__ import annotations

import pytest
import torch
from conftest import untracked
from test_warnings import spoken
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from proto_reg import PrototypicalRegularizer, Schedule, SinkhornAssigner

DIM, K, BATCH = 8, 4, 24


@pytest.mark.filterwarnings("ignore:metrics. no latent was counted:proto_reg.PrototypeWarning")
def test_weights_grow_linearly_after_warm_up() -> None:
    layer = PrototypicalRegularizer(DIM, K, schedule=Schedule(warmup_steps=2, ramp_steps=3)).double()
    z, g = torch.randn(2, BATCH, DIM, dtype=torch.float64)
    added, losses, active = [], [], []
    for _ in range(7):
        active.append(layer.metrics()["active"])
        leaf = z.clone().requires_grad_()
        out, info = layer(leaf)
        (out * g).sum().backward()
        added.append((leaf.grad - g).norm())
        losses.append(info.loss)
    expected = torch.tensor([0, 0, 1 / 4, 2 / 4, 3 / 4, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(active), expected.float())
    torch.testing.assert_close(torch.stack(added) / added[-1], expected)
    torch.testing.assert_close(torch.stack(losses) / losses[-1], expected)


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
@pytest.mark.filterwarnings("ignore:metrics. no latent was counted:proto_reg.PrototypeWarning")
def test_the_mmd_is_alone_until_prototypes_are_warm(mode: str) -> None:
    warm = {"schedule": Schedule(warmup_steps=1, mmd_steps=2, mmd_weight=0.4, ramp_steps=1)}
    layer = PrototypicalRegularizer(DIM, K, mode=mode, follow_rate=0.0, **warm)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    z, g = torch.randn(2, BATCH, DIM)
    for step in range(6):
        # Each weight is 0 in its warm-up, then half for one step, then full.
        # The MMD's weight begins after one step, the other weight after three steps.
        of_prototypes, of_mmd = (min(max(step - begin + 1, 0) / 2, 1) for begin in (3, 1))
        assert layer.metrics()["active"] == of_prototypes
        before = layer.head.prototypes.detach().clone()
        weights = 0.03 * of_prototypes, (0.4 if step < 3 else 0.1) * of_mmd
        weighed = {"prototype_weight": weights[0], "mmd_weight": weights[1]}
        constant = untracked(PrototypicalRegularizer(DIM, K, mode=mode, follow_rate=0.0, **weighed))
        constant.head.load_state_dict(layer.head.state_dict())
        gradients = []
        for each in (layer, constant):
            leaf = z.clone().requires_grad_()
            out, info = each(leaf)
            ((out * g).sum() + (info.loss if mode == "weighted" else 0)).backward()
            gradients.append((leaf.grad, info.loss.detach()))
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(layer.head.prototypes, before) == (step < 3)


@pytest.mark.warm_up
@pytest.mark.filterwarnings("ignore:metrics. no latent was counted:proto_reg.PrototypeWarning")
def test_the_default_is_some_steps_of_the_mmd_alone() -> None:
    default = PrototypicalRegularizer(DIM, K)
    assert default.schedule.mmd_steps == 50
    assert PrototypicalRegularizer(DIM, K, mmd_weight=0.0).schedule.mmd_steps == 0
    assert PrototypicalRegularizer.paper(DIM, K).schedule.mmd_steps == 0
    asked = PrototypicalRegularizer(DIM, K, schedule=Schedule(mmd_steps=50))
    asked.load_state_dict(default.state_dict())
    z, g = torch.randn(2, BATCH, DIM)
    for step in range(51):
        assert default.metrics()["active"] == (step >= 50)
        for layer in (default, asked):
            layer.zero_grad()
            layer(z.clone().requires_grad_())[0].backward(g)
        assert torch.equal(default.head.prototypes.grad, asked.head.prototypes.grad)
        assert default.head.prototypes.grad.any() == (step >= 50)


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_schedules_that_are_over_leave_the_same_bits(mode: str) -> None:
    over = PrototypicalRegularizer(DIM, K, mode=mode, schedule=Schedule(warmup_steps=1, mmd_steps=1, ramp_steps=2))
    z, g = torch.randn(2, BATCH, DIM)
    for step in range(6):
        assert (over._factors().shares is None) == (step >= 4)
        over(z.clone().requires_grad_())
    never = PrototypicalRegularizer(DIM, K, mode=mode)
    never.load_state_dict(over.state_dict())
    results = []
    for layer in (over, never):
        leaf = z.clone().requires_grad_()
        out, info = layer(leaf)
        ((out * g).sum() + (info.loss if mode == "weighted" else 0)).backward()
        results.append([leaf.grad, layer.head.prototypes.grad, *info, *layer.state_dict().values()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
@pytest.mark.parametrize(
    "schedule", [{"schedule": Schedule(warmup_steps=2)}, {"schedule": Schedule(mmd_steps=1, ramp_steps=1)}]
)
@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
def test_checkpointing_at_the_step_at_which_schedules_end(mode: str, schedule: dict) -> None:
    layer = PrototypicalRegularizer(DIM, K, mode=mode, **schedule)

    def forward(z: torch.Tensor) -> torch.Tensor:
        out, info = layer(z)
        return out.square().sum() + info.loss

    for _ in range(6):  # each forward runs twice and counts twice
        leaf = torch.randn(BATCH, DIM, requires_grad=True)
        checkpoint(forward, leaf, use_reentrant=False).backward()
        assert leaf.grad.isfinite().all()


def test_a_schedule_of_fake_tensors(backend: str) -> None:
    with FakeTensorMode():
        layer = PrototypicalRegularizer(DIM, K, schedule=Schedule(warmup_steps=1, mmd_steps=1))
        out, info = layer(torch.randn(BATCH, DIM, requires_grad=True))
        (out.sum() + info.loss).backward()
    assert out.shape == (BATCH, DIM)


def test_prototypes_follow_nothing_until_they_are_warm() -> None:
    layer = PrototypicalRegularizer(DIM, K, schedule=Schedule(mmd_steps=2))
    seen = []
    for _ in range(3):
        layer(torch.randn(BATCH, DIM, requires_grad=True))
        seen.append(bool(layer.follower.weight_sums.any()))
    assert seen == [False, False, True]


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
def test_temperature_and_epsilon_anneal_together(mode: str) -> None:
    layer = PrototypicalRegularizer(
        DIM,
        K,
        mode=mode,
        schedule=Schedule(temperature=(0.5, 0.1), temperature_steps=4, warmup_steps=1),
        follow_rate=0.0,
    ).double()
    z = torch.randn(BATCH, DIM, dtype=torch.float64)
    for tau in (0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1):
        constant = PrototypicalRegularizer(
            DIM,
            K,
            mode=mode,
            schedule=Schedule(warmup_steps=1, temperature=tau),
            assigner=SinkhornAssigner(tau / 2),
            head=layer.head,
            follow_rate=0.0,
        ).double()
        constant.steps += int(layer.steps)
        gradients = []
        for each in (layer, constant):
            leaf = z.clone().requires_grad_()
            out, info = each(leaf)
            (out.sum() + info.loss).backward()
            gradients.append([leaf.grad, layer.head.prototypes.grad.clone(), info.prototype_loss, info.codes])
            layer.zero_grad()
            assert torch.equal(info.scores, layer.head(z))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # the scores have a float32 factor


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": (0.2, 0.1)}, "temperature_steps: expected an int > 0 with two"),
        ({"temperature_steps": 5}, "and 0 with one, got 5"),
        ({"temperature": (0.2, 0.1, 0.3), "temperature_steps": 5}, "temperature: expected a number or"),
        ({"temperature": (0.2, 0.0), "temperature_steps": 5}, "temperature: expected a finite number > 0"),
        ({"ramp_steps": -1}, "ramp_steps: expected an int >= 0"),
        ({"mmd_steps": -1}, "mmd_steps: expected an int >= 0"),
        ({"mmd_weight": -1}, "mmd_weight: expected a finite number >= 0"),
    ],
)
def test_arguments(options: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Schedule(**options)
    assert words in str(caught.value)
    with pytest.raises(TypeError, match="schedule: expected a Schedule, got dict"):
        PrototypicalRegularizer(DIM, K, schedule=options)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Schedule(warmup_steps=60, ramp_steps=40), ["warmup_steps + ramp_steps = 100 covers all 100 steps"]),
        (Schedule(mmd_steps=100), ["mmd_steps = 100 covers all 100 steps"]),
        (Schedule(warmup_steps=60, ramp_steps=39), []),
    ],
)
def test_a_schedule_as_long_as_the_training_is_warned_of(schedule: Schedule, words: list[str]) -> None:
    said = spoken(lambda: PrototypicalRegularizer(DIM, K, schedule=schedule).expect(100))
    assert len(said) == len(words)
    assert all(ours in text for ours, text in zip(words, said, strict=True))


@pytest.mark.warm_up
def test_a_schedule_that_stands_still_is_warned_of() -> None:
    z = torch.randn(BATCH, DIM, requires_grad=True)
    (text,) = spoken(lambda: untracked(PrototypicalRegularizer(DIM, K))(z))
    assert "schedule=Schedule(mmd_steps=0)" in text
    cured = PrototypicalRegularizer(DIM, K, schedule=Schedule(mmd_steps=0))
    assert spoken(lambda: untracked(cured)(z)) == []
    begun = PrototypicalRegularizer(DIM, K)
    begun(z)
    assert spoken(lambda: untracked(begun)(z)) == []  # a pass that does not count, between passes that do


def test_a_gpu_is_not_waited_for_to_know_that_a_warm_up_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the layer knows the step from the last copy that has arrived. Here these copies are at 73 and 123."""
    layer = PrototypicalRegularizer(DIM, K, schedule=Schedule(warmup_steps=3, mmd_steps=20), prototype_weight=0.0)
    z = torch.randn(BATCH, DIM, requires_grad=True)
    known = []
    for _ in range(130):
        layer(z)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(torch.Tensor, "is_cpu", False)
            known.append((layer._reached() >= 73, layer._reached() >= 123, layer._factors().shares is None))
    assert known == [(False, False, False)] * 72 + [(True, False, True)] * 50 + [(True, True, True)] * 8
    for change in (lambda: layer.load_state_dict(layer.state_dict()), layer.reset_parameters):
        layer.watch.active_steps = 40.0
        change()
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(torch.Tensor, "is_cpu", False)
            assert layer._reached() < 1
