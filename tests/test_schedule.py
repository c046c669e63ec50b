"""Weights and temperature over the steps of a training."""

from __future__ import annotations

import pytest
import torch
from test_warnings import spoken

from proto_reg import PrototypicalRegularizer, SinkhornAssigner

DIM, K, BATCH = 8, 4, 24


def test_weights_grow_linearly_after_warm_up() -> None:
    layer = PrototypicalRegularizer(DIM, K, warmup_steps=2, ramp_steps=3).double()
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
def test_temperature_and_epsilon_anneal_together(mode: str) -> None:
    layer = PrototypicalRegularizer(
        DIM, K, mode=mode, temperature=(0.5, 0.1), temperature_steps=4, warmup_steps=1, follow_rate=0.0
    ).double()
    z = torch.randn(BATCH, DIM, dtype=torch.float64)
    for tau in (0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1):
        constant = PrototypicalRegularizer(
            DIM, K, mode=mode, temperature=tau, assigner=SinkhornAssigner(tau / 2), head=layer.head, follow_rate=0.0
        ).double()
        constant.steps += int(layer.steps)
        constant.warmup_steps = 1
        gradients = []
        for each in (layer, constant):
            leaf = z.clone().requires_grad_()
            out, info = each(leaf)
            (out.sum() + info.loss).backward()
            gradients.append([leaf.grad, layer.head.prototypes.grad.clone(), info.prototype_loss, info.codes])
            layer.zero_grad()
            assert torch.equal(info.scores, layer.head(z))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # the factor of the scores is float32


def test_arguments() -> None:
    for options, words in (
        ({"temperature": (0.2, 0.1)}, "temperature_steps: expected an int > 0 with two"),
        (
            {"temperature_steps": 5},
            "and 0 with one, got 5",
        ),
        ({"temperature": (0.2, 0.1, 0.3), "temperature_steps": 5}, "temperature: expected a number or"),
        ({"temperature": (0.2, 0.0), "temperature_steps": 5}, "temperature: expected a finite number > 0"),
        ({"ramp_steps": -1}, "ramp_steps: expected an int >= 0"),
    ):
        with pytest.raises(ValueError) as caught:
            PrototypicalRegularizer(DIM, K, **options)
        assert words in str(caught.value)


def test_a_ramp_as_long_as_the_training_is_warned_of() -> None:
    (text,) = spoken(lambda: PrototypicalRegularizer(DIM, K, warmup_steps=60, ramp_steps=40, total_steps=100))
    assert "warmup_steps + ramp_steps = 100 covers all 100 steps" in text
    assert spoken(lambda: PrototypicalRegularizer(DIM, K, warmup_steps=60, ramp_steps=39, total_steps=100)) == []
