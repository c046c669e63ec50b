"""Each warning comes when it is due, once and with its cure. It never comes when nothing is wrong."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import proto_reg
from proto_reg import LatentQueue, PrototypeHead, PrototypicalRegularizer, Schedule, SinkhornAssigner
from proto_reg._warnings import SETTLED

DIM, K = 16, 4


def spoken(act) -> list[str]:
    """Call ``act`` and return the texts of the library's warnings."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in record if issubclass(w.category, proto_reg.PrototypeWarning)]


def walk(layer: PrototypicalRegularizer, z: torch.Tensor, steps: int, **options) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6, **options)
    for _ in range(steps):
        layer(z.requires_grad_())[0].sum().backward()
        optimizer.step()


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    layer.expect(500)
    layer.head.prototypes.data.copy_(10 * torch.eye(DIM)[:K])
    z = layer.head.sample(200)
    assert spoken(lambda: walk(layer, z, 2 * SETTLED + 100)) == []


def test_epsilon_equal_to_temperature() -> None:
    (text,) = spoken(
        lambda: PrototypicalRegularizer(DIM, K, assigner=SinkhornAssigner(0.1), schedule=Schedule(temperature=0.1))
    )
    assert "epsilon = temperature = 0.1" in text
    assert "smaller" in text


def test_warm_up_as_long_as_the_training() -> None:
    (text,) = spoken(lambda: PrototypicalRegularizer(DIM, K, schedule=Schedule(warmup_steps=100)).expect(100))
    assert "covers all 100 steps" in text
    assert spoken(lambda: PrototypicalRegularizer(DIM, K, schedule=Schedule(warmup_steps=99)).expect(100)) == []


def test_thousands_of_dimensions() -> None:
    (text,) = spoken(lambda: PrototypicalRegularizer(4096, K))
    assert "latent_dim = 4096" in text


def test_fewer_latents_than_prototypes_is_legitimate_and_said_once() -> None:
    layer = PrototypicalRegularizer(DIM, 8)
    (text,) = spoken(lambda: walk(layer, torch.randn(3, DIM), 3))
    assert text.startswith("3 latents for 8 prototypes")
    queued = PrototypicalRegularizer(DIM, 8, queue=LatentQueue(20, DIM))
    assert spoken(lambda: walk(queued, torch.randn(3, DIM), 3)) == []


def one_of(layer: PrototypicalRegularizer, z: torch.Tensor, steps: int, beginning: str) -> str:
    texts = [text for text in spoken(lambda: walk(layer, z, steps)) if beginning in text]
    assert len(texts) == 1
    return texts[0]


def test_latents_that_are_never_negative() -> None:
    assert "without ReLU" in one_of(PrototypicalRegularizer(DIM, K), torch.rand(64, DIM), 210, "All latents are >= 0")


def test_latents_far_from_their_prototypes() -> None:
    text = one_of(PrototypicalRegularizer(DIM, K, std=1.0), 20 * torch.randn(64, DIM), 210, "squared distance")
    assert "AnchoredMMDLoss('energy')" in text


def test_prototypes_inside_each_others_noise() -> None:
    layer = PrototypicalRegularizer(DIM, K, head=PrototypeHead(DIM, K, std=1.0, init_std=0.1), follow_rate=0.0)
    assert "inside each other's noise" in one_of(layer, torch.randn(64, DIM), SETTLED + 1, "Two prototypes are")


def test_a_std_that_follows_the_latents_is_no_matter_of_warnings() -> None:
    layer = PrototypicalRegularizer(DIM, K, head=PrototypeHead(DIM, K, init_std=0.01), follow_rate=0.0)
    z = layer.head.prototypes.detach()[torch.arange(64) % K] + 0.05 * torch.randn(64, DIM)
    texts = spoken(lambda: walk(layer, z, SETTLED + 1))
    assert not any("std" in text for text in texts)


def test_a_std_is_named_where_it_is_a_cure() -> None:
    """If r^2/D is near 1, another std would not fit the latents."""
    for radius, cure in ((0.5, "Build the layer with std=0.5"), (1.0, "noise. Use fewer prototypes")):
        layer = PrototypicalRegularizer(DIM, K, std=1.0, follow_rate=0.0, prototype_weight=0.0)
        layer.head.prototypes.data.copy_(1.2 * torch.eye(DIM)[:K])
        z = layer.head.prototypes.detach().repeat(40, 1) + radius * torch.randn(40 * K, DIM)
        assert cure in one_of(layer, z, SETTLED + 1, "1.70 std apart")


def test_prototypes_that_no_optimizer_knows() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    z = layer.head.sample(64).requires_grad_()
    texts = spoken(lambda: [layer(z) for _ in range(250)])
    assert len([text for text in texts if "No optimizer has touched the prototypes" in text]) == 1
    stepped = PrototypicalRegularizer(DIM, K, follow_rate=0.0)
    # A fused optimizer writes without a change of torch's version counters.
    assert not any("No optimizer" in text for text in spoken(lambda: walk(stepped, z, 250, fused=True)))
    frozen = PrototypicalRegularizer(DIM, K)
    frozen.head.requires_grad_(False)
    assert not any("No optimizer" in text for text in spoken(lambda: [frozen(z) for _ in range(250)]))
    without = PrototypicalRegularizer(DIM, K, prototype_weight=0.0)  # its prototypes must not move
    assert not any("No optimizer" in text for text in spoken(lambda: walk(without, z, 250)))


@pytest.mark.warm_up
@pytest.mark.parametrize("begin", [0, 50, 75, 300])
def test_a_warm_up_does_not_put_warnings_off(begin: int) -> None:
    """They come some steps after it. Without a warm-up they come after the same number of steps."""
    without = PrototypicalRegularizer(DIM, K, schedule=Schedule(mmd_steps=begin))
    z = without.head.sample(64).requires_grad_()
    assert not any("No optimizer" in text for text in spoken(lambda: [without(z) for _ in range(begin + 99)]))
    assert any("No optimizer" in text for text in spoken(lambda: without(z)))
    stuck = PrototypicalRegularizer(DIM, K, schedule=Schedule(mmd_steps=begin, temperature=100.0))
    assert not any("ln K" in text for text in spoken(lambda: walk(stuck, torch.randn(64, DIM), begin + SETTLED - 1)))
    assert "Lower the temperature" in one_of(stuck, torch.randn(64, DIM), 1, "ln K")


def test_a_loss_stuck_at_its_maximum() -> None:
    layer = PrototypicalRegularizer(DIM, K, schedule=Schedule(temperature=100.0))
    assert "Lower the temperature" in one_of(layer, torch.randn(64, DIM), SETTLED + 1, "ln K")


def test_the_warning_points_at_the_readers_line() -> None:
    with pytest.warns(proto_reg.PrototypeWarning) as record:
        PrototypicalRegularizer(4096, 8)
    assert record[0].filename == __file__


def test_copies_and_checkpoints_know_what_was_said() -> None:
    import copy

    layer = PrototypicalRegularizer(DIM, 8)
    assert len(spoken(lambda: walk(layer, torch.randn(3, DIM), 2))) == 1
    assert spoken(lambda: walk(copy.deepcopy(layer), torch.randn(3, DIM), 2)) == []


def test_a_last_smaller_batch_is_nothing_to_speak_of() -> None:
    layer = PrototypicalRegularizer(DIM, 8)
    assert spoken(lambda: [walk(layer, torch.randn(count, DIM), 1) for count in (32, 3, 32, 3)]) == []
    # A small last batch of two views goes through the layer twice. It gives no warning, either.
    assert spoken(lambda: [walk(layer, torch.randn(count, DIM), 1) for count in 3 * (32, 32, 3, 3)]) == []
    assert len(spoken(lambda: walk(layer, torch.randn(3, DIM), 20))) == 1


def test_latents_that_stay_near_their_prototypes() -> None:
    layer = PrototypicalRegularizer(DIM, K, std=1.0)
    z = layer.head.prototypes.detach()[torch.arange(64) % K] + 0.1 * torch.randn(64, DIM)
    text = one_of(layer, z, 410, "where N(v, I) has 1")
    std = float(re.search(r"with std=([\d.]+)\.", text).group(1))
    assert std == pytest.approx(0.1, rel=0.1)
    layer = PrototypicalRegularizer(DIM, K, std=std)
    z = layer.head.prototypes.detach()[torch.arange(64) % K] + 0.01 * torch.randn(64, DIM)
    assert float(re.search(r"with std=([\d.]+)\.", one_of(layer, z, 410, "N(v, 0.1^2 I) has 1")).group(1)) < 0.02


def test_latents_wider_than_aimed_at() -> None:
    """The warning comes soon for a factor of 9. For a factor of 2.25 it waits, as the latents may still come nearer."""
    for distance, steps in ((3.0, 410), (1.5, 1610)):
        layer = PrototypicalRegularizer(DIM, K, std=0.5, follow_rate=0.0, prototype_weight=0.0)
        layer.head.prototypes.data.copy_(20 * torch.eye(DIM)[:K])
        z = layer.head.prototypes.detach().repeat(12, 1) + 0.5 * distance * torch.randn(12 * K, DIM)
        text = one_of(layer, z, steps, "less varied")
        assert float(re.search(r"with std=([\d.]+)\.", text).group(1)) == pytest.approx(0.5 * distance, rel=0.1)
        assert "where N(v, 0.5^2 I) has 1" in text


def test_latents_on_their_prototypes_and_none_at_all() -> None:
    """A radius of 0 has no finite scale as its cure. Without latents there is no radius and no warning."""
    layer = PrototypicalRegularizer(DIM, K, std=1.0, mmd_weight=0.0)
    z = layer.head.prototypes.detach()[torch.arange(64) % K].requires_grad_()
    assert "std=" in one_of(layer, z, 410, "where N(v, I) has 1")
    layer, nothing = PrototypicalRegularizer(DIM, K), torch.zeros(64, dtype=torch.bool)
    texts = spoken(lambda: [layer(z, nothing) for _ in range(410)])
    assert not any("r^2/D" in text or ">= 0" in text for text in texts)


def test_latents_that_do_not_count_are_not_looked_at() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    layer.head.prototypes.data.copy_(20 * torch.eye(DIM)[:K])
    z, mask = layer.head.sample(200), torch.arange(200) < 100
    assert spoken(lambda: [layer(z.requires_grad_(), mask) for _ in range(60)]) == []


def test_latents_without_a_gradient() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    z = layer.head.sample(64)
    assert any("carry no gradient" in text for text in spoken(lambda: [layer(z) for _ in range(60)]))
    z.requires_grad_()
    assert not any("carry no gradient" in text for text in spoken(lambda: [layer(z) for _ in range(60)]))


@pytest.mark.parametrize("where", ["latents", "prototypes"])
def test_what_is_not_finite(where: str) -> None:
    layer = PrototypicalRegularizer(DIM, K)
    z = layer.head.sample(64)
    with torch.no_grad():
        (z if where == "latents" else layer.head.prototypes)[0, 0] = torch.nan
    texts = spoken(lambda: [layer(z.requires_grad_()) for _ in range(60)])
    assert any("nan_policy='isolate'" in text for text in texts)


def test_errors_name_argument_expectation_and_cure() -> None:
    cases = [
        (lambda: SinkhornAssigner(-0.1), ValueError, "epsilon: expected a finite number > 0, got -0.1"),
        (lambda: SinkhornAssigner("a"), TypeError, "epsilon: expected a number"),
        (
            lambda: proto_reg.functional.latent_metrics(torch.randn(8, DIM), PrototypicalRegularizer(DIM, K)),
            TypeError,
            "head: expected a PrototypeHead, got PrototypicalRegularizer. Pass its .head.",
        ),
        (
            lambda: PrototypicalRegularizer(DIM, K)(torch.randn(8, 2 * DIM)),
            ValueError,
            f"attach: select=slice({DIM})",
        ),
        (
            lambda: PrototypicalRegularizer(DIM, K, mmd="energy"),
            TypeError,
            "mmd: expected an AnchoredMMDLoss, got str. Pass AnchoredMMDLoss(...)",
        ),
        (lambda: SinkhornAssigner(num_iters=0), ValueError, "num_iters: expected an int >= 1, got 0"),
        (lambda: SinkhornAssigner(num_iters=2.5), TypeError, "num_iters: expected an int"),
        (lambda: SinkhornAssigner(marginals=[0.5, 0.6]), ValueError, "sum 1.1. Divide them by their sum"),
        (lambda: SinkhornAssigner(marginals=[1.5, -0.5]), ValueError, "marginals: expected non-negative"),
        (
            lambda: SinkhornAssigner(backend="tpu"),
            ValueError,
            "backend: expected one of 'auto', 'torch', 'cpu', 'cuda'",
        ),
        (lambda: SinkhornAssigner(nan_policy="ignore"), ValueError, "nan_policy: expected one of"),
        (
            lambda: SinkhornAssigner()(torch.randn(3)),
            ValueError,
            "scores: expected shape (B, K) or (..., B, K), got (3,)",
        ),
        (lambda: SinkhornAssigner()(torch.randn(0, 3)), ValueError, "Skip empty batches"),
        (lambda: SinkhornAssigner()(torch.ones(2, 3).long()), TypeError, "scores: expected a floating-point"),
        (
            lambda: SinkhornAssigner(marginals=[0.5, 0.5])(torch.randn(4, 3)),
            ValueError,
            "marginals: expected shape (3,)",
        ),
        (lambda: proto_reg.AnchoredMMDLoss("rbf"), ValueError, "kernel: expected one of 'gaussian'"),
        (lambda: proto_reg.AnchoredMMDLoss(scales=()), ValueError, "scales: expected at least one"),
        (lambda: proto_reg.AnchoredMMDLoss(scales=(0.0,)), ValueError, "scales: expected a finite number > 0"),
        (lambda: proto_reg.AnchoredMMDLoss(target="exact"), ValueError, "target: expected one of"),
        (lambda: PrototypicalRegularizer(0, K), ValueError, "latent_dim: expected an int >= 1, got 0"),
        (lambda: PrototypicalRegularizer(DIM, True), TypeError, "num_prototypes: expected an int"),
        (
            lambda: PrototypicalRegularizer(DIM, K, mmd_weight=-1),
            ValueError,
            "mmd_weight: expected a finite number >= 0",
        ),
        (
            lambda: PrototypicalRegularizer(DIM, K, layout="b c h"),
            ValueError,
            "layout: expected axis names with one 'd'",
        ),
        (lambda: PrototypicalRegularizer(DIM, K, mode="both"), ValueError, "mode: expected one of"),
        (lambda: PrototypicalRegularizer(DIM, K, follow_rate=1.0), ValueError, "follow_rate: expected a share"),
        (lambda: mmd(torch.randn(4, 3), labels=torch.zeros(4).int()), TypeError, "assignments: expected int64"),
        (lambda: mmd(torch.randn(4, 3), labels=torch.zeros(5).long()), ValueError, "assignments: expected shape (4,)"),
        (lambda: mmd(torch.randn(4, 2), labels=torch.zeros(4).long()), ValueError, "anchors: expected 2 columns"),
    ]
    for act, kind, words in cases:
        with pytest.raises(kind) as caught:
            act()
        assert words in str(caught.value)
        assert str(caught.value).endswith(".")


def mmd(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return proto_reg.functional.anchored_mmd(z, torch.randn(2, 3), labels)
