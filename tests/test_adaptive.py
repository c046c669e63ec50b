"""Adaptive marginals: EM finds the weights of the mixture, in training only. It resumes exactly and never collapses."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import untracked
from torch import Tensor
from torch.utils.data import TensorDataset

from proto_reg import PrototypeHead, PrototypicalRegularizer, Schedule, SinkhornAssigner

K, DIM = 6, 8
SHARES = torch.tensor([0.5, 0.25, 0.12, 0.06, 0.04, 0.03])


def adaptive(**options) -> SinkhornAssigner:
    return SinkhornAssigner(marginals="adaptive", num_prototypes=K, group=None, **options)


def clusters(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents (count, D) of K kinds with unequal shares, and the centres of the kinds."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.eye(K, DIM)
    kinds = torch.multinomial(SHARES, count, replacement=True, generator=generator)
    return centres[kinds] + 0.5 * torch.randn(count, DIM, generator=generator), centres


def layer_of(**options) -> PrototypicalRegularizer:
    layer = PrototypicalRegularizer(DIM, K, assigner=adaptive(), **options)
    with torch.no_grad():
        layer.head.prototypes.copy_(clusters(1)[1])
    return layer


def step(layer: PrototypicalRegularizer, z: Tensor, **options) -> None:
    z = z.clone().requires_grad_()
    out, info = layer(z, **options)
    (out.square().sum() + (info.loss if layer.mode == "weighted" else 0)).backward()


def test_they_go_where_em_goes() -> None:
    """With fixed scores, the marginals converge to the weights of EM in float64.

    Each step of this EM draws the weights towards uniform ones.
    """
    scores = torch.randn(500, K) + torch.tensor([1.0, 0.5, 0, 0, -0.5, -1])
    assigner = adaptive(smoothing=0.2)
    for _ in range(3000):
        assigner.observe(scores, 0.7)
    weights = torch.full((K,), 1 / K, dtype=torch.float64)
    for _ in range(3000):
        responsibilities = (scores.double() / 0.7 + weights.log()).softmax(1)
        weights = 0.8 * responsibilities.mean(0) + 0.2 / K
    torch.testing.assert_close(assigner.marginals.double(), weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_a_layer_finds_the_shares_of_its_latents(mode: str) -> None:
    layer = layer_of(mode=mode)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    for seed in range(400):
        step(layer, clusters(64, seed)[0])
        optimizer.step()
    found = layer.assigner.marginals
    torch.testing.assert_close(found, 0.9 * SHARES + 0.1 / K, rtol=0, atol=0.03)
    nearest = layer.eval()(clusters(2000, 999)[0])[1].assignments
    torch.testing.assert_close(torch.bincount(nearest, minlength=K) / 2000, SHARES, rtol=0, atol=0.03)


def test_no_share_falls_below_the_smoothed_one() -> None:
    assigner = adaptive(smoothing=0.3)
    scores = torch.zeros(10, K)
    scores[:, 2] = 100
    for _ in range(2000):
        assigner.observe(scores, 0.1)
    others = torch.arange(K) != 2
    torch.testing.assert_close(assigner.marginals[others], torch.full((K - 1,), 0.3 / K))
    assert assigner.marginals.sum().item() == pytest.approx(1, abs=1e-6)


def test_compiled_and_plain_steps_agree(backend: str) -> None:
    torch.manual_seed(0)
    layer = layer_of(schedule=Schedule(temperature=(0.3, 0.1), temperature_steps=20, ramp_steps=3))
    twin = copy.deepcopy(layer)
    twin.mmd.backend = "torch"  # so no step uses the fused operator
    for seed in range(10):
        z, _ = clusters(32, seed)
        step(layer, z)
        step(twin, z)
    torch.testing.assert_close(layer.assigner.marginals, twin.assigner.marginals, rtol=0, atol=1e-6)
    assert not torch.equal(layer.assigner.marginals, adaptive().marginals)


def test_rows_that_do_not_count_change_nothing() -> None:
    scores = torch.randn(20, K)
    spoilt = torch.cat([scores, torch.full((2, K), torch.nan), torch.randn(3, K)])
    counted = torch.arange(25) < 22
    one, other = adaptive(), adaptive()
    one.observe(scores, 0.1)
    other.observe(spoilt, 0.1, counted)
    torch.testing.assert_close(one.marginals, other.marginals)
    other.observe(torch.full((4, K), torch.nan), 0.1)
    torch.testing.assert_close(one.marginals, other.marginals)


def test_only_training_with_the_prototype_loss_at_work_changes_them() -> None:
    z, _ = clusters(64)
    uniform = adaptive().marginals
    uncounted, idle, warm = (
        untracked(layer_of()),
        layer_of(prototype_weight=0),
        layer_of(schedule=Schedule(warmup_steps=2)),
    )
    for layer in (uncounted, idle, warm):
        step(layer, z)
        assert torch.equal(layer.assigner.marginals, uniform)
    step(warm, z)
    step(warm, z)
    assert not torch.equal(warm.assigner.marginals, uniform)
    before = warm.assigner.marginals.clone()
    warm.eval()(z)
    assert torch.equal(warm.assigner.marginals, before)
    warm.assigner.reset_parameters()
    assert torch.equal(warm.assigner.marginals, uniform)


def test_resume_is_exact() -> None:
    layer = layer_of()
    for seed in range(5):
        step(layer, clusters(64, seed)[0])
    twin = layer_of()
    twin.load_state_dict(layer.state_dict())
    for seed in range(5, 8):
        z = TensorDataset(clusters(64, seed)[0]).tensors[0]
        step(layer, z)
        step(twin, z)
    assert torch.equal(layer.assigner.marginals, twin.assigner.marginals)


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_compiled_layers_adapt(mode: str) -> None:
    layer = layer_of(mode=mode)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        z = clusters(64, seed)[0].requires_grad_()
        compiled(z)[0].sum().backward()
        step(twin, z.detach())
    torch.testing.assert_close(layer.assigner.marginals, twin.assigner.marginals, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="num_prototypes: expected a number with marginals='adaptive'"):
        SinkhornAssigner(marginals="adaptive")
    with pytest.raises(ValueError, match="num_prototypes: expected a number"):
        SinkhornAssigner(num_prototypes=3)
    with pytest.raises(ValueError, match="marginals: expected"):
        SinkhornAssigner(marginals="even", num_prototypes=3)
    with pytest.raises(ValueError, match=r"smoothing: expected a number in \(0, 1\], got 2"):
        adaptive(smoothing=2)
    with pytest.raises(ValueError, match="smoothing"):
        adaptive(smoothing=0)
    with pytest.raises(ValueError, match="marginals"):
        PrototypicalRegularizer(DIM, K + 1, head=PrototypeHead(DIM, K + 1), assigner=adaptive())
