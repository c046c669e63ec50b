"""The target standard deviation is a choice of units. A training is the same in these units."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor

from proto_reg import (
    AnchoredMMDLoss,
    LatentQueue,
    PrototypeHead,
    PrototypeWarning,
    PrototypicalRegularizer,
    Schedule,
    attach,
)
from proto_reg.functional import anchored_mmd, latent_metrics, prototype_scores

DIM, K, BATCH = 12, 5, 64
UNIT = 0.25  # a power of 2 causes no rounding


def two_layers(scores: str = "cosine", **options) -> tuple[PrototypicalRegularizer, PrototypicalRegularizer]:
    """One layer has the target N(v, I). The other has N(v, UNIT^2 I), and its prototypes are at UNIT times v."""
    one = PrototypicalRegularizer(DIM, K, head=PrototypeHead(DIM, K, similarity=scores), **copy.deepcopy(options))
    other = PrototypicalRegularizer(
        DIM, K, head=PrototypeHead(DIM, K, similarity=scores, std=UNIT), **copy.deepcopy(options)
    )
    with torch.no_grad():
        other.head.prototypes.copy_(UNIT * one.head.prototypes)
    return one, other


def train(layer: PrototypicalRegularizer, latents: Tensor, unit: float) -> list[Tensor]:
    """All results of three steps, in units of ``unit``. The loss uses the latents in these units."""
    seen: list[Tensor] = []
    optimizer = torch.optim.SGD(layer.parameters(), lr=unit**2)
    for batch in latents.split(BATCH):
        z = (unit * batch).requires_grad_()
        out, info = layer(z)
        loss = (out / unit).square().mean()
        optimizer.zero_grad()
        (loss + info.loss if layer.mode == "weighted" else loss).backward()
        optimizer.step()
        seen += [*(x.detach() for x in info), z.grad * unit, layer.head.prototypes.detach() / unit]
    return seen


@pytest.mark.parametrize("scores", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "weighted"},
        {"queue": LatentQueue(2 * BATCH, DIM)},
        {"mmd": AnchoredMMDLoss(max_tokens=16)},
        {"mmd": AnchoredMMDLoss("energy")},
        {"mmd": AnchoredMMDLoss(features=24)},
    ],
    ids=str,
)
def test_a_training_is_the_same_in_any_unit(options: dict, scores: str, backend: str) -> None:
    one, other = two_layers(scores, **options)
    latents = torch.randn(3 * BATCH, DIM) + one.head.prototypes.detach().repeat(3 * BATCH, 1)[: 3 * BATCH]
    for plain, scaled in zip(train(one, latents, 1.0), train(other, latents, UNIT), strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)
    assert other.metrics() == pytest.approx(one.metrics(), rel=1e-5)
    for figure, same in zip(figures(one, latents), figures(other, UNIT * latents), strict=True):
        torch.testing.assert_close(same, figure, rtol=1e-4, atol=1e-5)


def figures(layer: PrototypicalRegularizer, latents: Tensor) -> list[Tensor]:
    return [torch.as_tensor(value) for value in latent_metrics(latents, layer.head).values()]


def test_follower_goes_the_same_way_in_any_unit(backend: str) -> None:
    one, other = two_layers(follow_rate=0.5)
    before = one.head.prototypes.detach().clone()
    latents = torch.randn(3 * BATCH, DIM)
    train(one, latents, 1.0)
    train(other, latents, UNIT)
    torch.testing.assert_close(other.head.prototypes, UNIT * one.head.prototypes)
    assert (one.head.prototypes - before).abs().amax() > 0.1


def test_samples_are_those_of_the_distribution_aimed_at() -> None:
    head = PrototypeHead(400, 2, std=0.3)
    assert head.prototypes.std().item() == pytest.approx(0.15, rel=0.1)
    assert (head.sample(500, 1) - head.prototypes[1]).std().item() == pytest.approx(0.3, rel=0.02)
    assert (head.sample(500, 1, std=2) - head.prototypes[1]).std().item() == pytest.approx(2, rel=0.02)
    z = head.sample(200)
    assert latent_metrics(z, head)["r2_per_dim"] == pytest.approx(1, rel=0.02)
    normal = torch.distributions.Normal(head.prototypes[:, None].double(), 0.3)
    expected = normal.log_prob(z.double()).sum(2).logsumexp(0) - torch.tensor(2.0).log()
    torch.testing.assert_close(head.mixture().log_prob(z).double(), expected, rtol=1e-5, atol=0)


def test_euclidean_scores_are_the_mixtures_log_posterior() -> None:
    head = PrototypeHead(DIM, K, similarity="euclidean", std=0.3)
    z = head.sample(20)
    torch.testing.assert_close(head(z).softmax(1), head.mixture().responsibilities(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("target", "soft"), [("analytic", False), ("analytic", True), ("sampled", False)])
def test_mmd_is_least_where_latents_spread_by_std(target: str, soft: bool) -> None:
    v, assignments = torch.zeros(1, 32), torch.zeros(400, dtype=torch.int64)
    members = torch.ones(400, 1) if soft else assignments
    noise = torch.randn(400, 32)
    values = [anchored_mmd(s * noise, v, members, std=0.5, target=target).item() for s in (0.25, 0.5, 1.0)]
    assert abs(values[1]) < 0.1 * min(values[0], values[2])


def test_gradient_is_that_of_the_value() -> None:
    v, assignments = torch.randn(3, DIM, dtype=torch.float64), torch.arange(30) % 3
    z = torch.randn(30, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: anchored_mmd(z, v, assignments, std=0.6), z)
    value = anchored_mmd(z, v, assignments, std=0.6)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(AnchoredMMDLoss().value_and_gradient(z, v, assignments, std=0.6)[1], gradient)


@pytest.mark.parametrize("std", [0.3, 1 / 6, 1.0, 12345.678])
def test_a_checkpoint_knows_its_std(std: float) -> None:
    trained = PrototypicalRegularizer(DIM, K, std=std)
    fresh = PrototypicalRegularizer(DIM, K)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.head.std == pytest.approx(std, rel=3e-8)  # float32 cannot tell the difference
    for convert in (torch.nn.Module.double, torch.nn.Module.bfloat16):
        same = convert(PrototypicalRegularizer(DIM, K, std=std))
        same.load_state_dict(trained.state_dict())
        assert same.head.std == std
        again = PrototypicalRegularizer(DIM, K)
        again.load_state_dict(same.state_dict())
        assert again.head.std == fresh.head.std


@pytest.mark.parametrize("std", [0.1, 0.3, 0.25, 1.0, 2.5, 123.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_half_precision_checkpoint_keeps_the_digits_of_std(dtype: torch.dtype, std: float) -> None:
    saved = PrototypicalRegularizer(DIM, K, std=std).state_dict()
    saved = {name: value.to(dtype) if value.is_floating_point() else value for name, value in saved.items()}
    fresh, same = PrototypicalRegularizer(DIM, K), PrototypicalRegularizer(DIM, K, std=std)
    fresh.load_state_dict(saved)
    same.load_state_dict(saved)  # no warning: in half precision both are equal
    assert fresh.head.std == same.head.std == std


def test_a_given_std_that_a_checkpoint_contradicts_is_warned_of() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x)

    model = Model()
    attach(model, "encoder", DIM, K, std=0.25)
    usual, paper = PrototypicalRegularizer(DIM, K).state_dict(), PrototypicalRegularizer.paper(DIM, K).state_dict()
    for layer, saved in (
        (PrototypicalRegularizer(DIM, K, std=0.25), usual),
        (PrototypicalRegularizer(DIM, K, head=PrototypeHead(DIM, K, std=0.25)), usual),
        (PrototypicalRegularizer.paper(DIM, K, std=0.25), paper),
        (pickle.loads(pickle.dumps(PrototypicalRegularizer(DIM, K, std=0.25))), usual),
        (model.prototypes, usual),
    ):
        with pytest.warns(PrototypeWarning, match=r"std: 0\.25 was given, but the loaded state has 1,") as record:
            layer.load_state_dict(saved)
        assert "head.std = 0.25 after loading" in str(record[0].message)
        assert record[0].filename == __file__
        assert layer.head.std == 1
        layer.load_state_dict(saved)  # once
        layer.head.std = 0.25
        assert layer.state_dict()["head._extra_state"] == 0.25


def test_a_std_that_nobody_gave_is_loaded_without_a_word() -> None:
    for make in (PrototypicalRegularizer, PrototypicalRegularizer.paper):
        saved = make(DIM, K, std=0.25).state_dict()
        same, layer = make(DIM, K, std=0.25), make(DIM, K)
        same.load_state_dict(saved)
        layer.load_state_dict(saved)
        assert layer.head.std == 0.25


def test_a_head_that_was_made_without_memory_keeps_its_std() -> None:
    with torch.device("meta"):
        head = PrototypeHead(DIM, K, std=0.3)
        state = head.state_dict()["_extra_state"]
    head.to_empty(device="cpu").reset_parameters()
    assert state.item() == head.state_dict()["_extra_state"].item() == pytest.approx(0.3)
    assert head.prototypes.std().item() == pytest.approx(0.15, rel=0.3)


def test_layer_and_head_agree() -> None:
    assert PrototypicalRegularizer(DIM, K, std=0.5).head.std == 0.5
    assert PrototypicalRegularizer(DIM, K, head=PrototypeHead(DIM, K, std=0.5)).head.std == 0.5
    assert PrototypicalRegularizer.paper(DIM, K, std=0.5).head.std == 0.5
    assert PrototypicalRegularizer.paper(DIM, K, std=None).head.std == 1
    with pytest.raises(ValueError, match=r"head: expected std=2.0, got 0.5"):
        PrototypicalRegularizer(DIM, K, std=2.0, head=PrototypeHead(DIM, K, std=0.5))
    for call in (
        lambda: PrototypicalRegularizer(DIM, K, std=0.0),
        lambda: PrototypicalRegularizer(DIM, K, std=-1.0, head=PrototypeHead(DIM, K)),
        lambda: PrototypeHead(DIM, K, std=-1.0),
        lambda: anchored_mmd(torch.zeros(4, 2), torch.zeros(1, 2), torch.zeros(4, dtype=torch.int64), std=0.0),
        lambda: prototype_scores(torch.zeros(4, 2), torch.zeros(1, 2), "dot", std=0.0),
    ):
        with pytest.raises(ValueError, match="std: expected a finite number > 0"):
            call()


def test_a_state_without_a_std_that_could_be_one() -> None:
    head = PrototypeHead(DIM, K, std=0.5)
    state = head.state_dict()
    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std: expected a finite number > 0"):
            head.load_state_dict(state | {"_extra_state": torch.tensor(value)})
        assert head.std == 0.5


def trained(layer: PrototypicalRegularizer, scale: float, steps: int) -> PrototypicalRegularizer:
    """Latents of a fixed ``scale`` around the prototypes, which do not learn."""
    layer.head.prototypes.requires_grad_(False)
    v = layer.head.prototypes.detach()
    for step in range(int(layer.steps), int(layer.steps) + steps):
        torch.manual_seed(step)
        layer((v[torch.randint(K, (BATCH,))] + scale * torch.randn(BATCH, DIM)).requires_grad_())
    return layer


def far_apart(**options) -> PrototypicalRegularizer:
    layer = PrototypicalRegularizer(DIM, K, schedule=Schedule(mmd_steps=10), **options)
    layer.head.place(slice(None), 30 * torch.eye(K, DIM))
    return layer


@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_a_std_that_was_not_given_follows_the_latents(scale: float) -> None:
    layer = trained(far_apart(), scale, 409)
    assert layer.head.std == 1
    trained(layer, scale, 1)
    assert layer.head.std == pytest.approx(scale, rel=0.1)
    given = far_apart(std=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(given, scale, 410)
    assert given.head.std == 1


def test_what_may_be_a_start_is_left_until_the_latents_have_a_scale() -> None:
    layer = trained(far_apart(), 0.6, 1609)
    assert layer.head.std == 1
    trained(layer, 0.6, 1)
    assert layer.head.std == pytest.approx(0.6, rel=0.1)


def test_a_resumed_training_follows_as_it_would_have() -> None:
    straight = trained(far_apart(), 0.1, 410)
    resumed = far_apart()
    resumed.load_state_dict(trained(far_apart(), 0.1, 300).state_dict())
    trained(resumed, 0.1, 110)
    assert resumed.head.std == straight.head.std != 1
    again = far_apart()
    again.load_state_dict(straight.state_dict())
    assert again.head.std == straight.head.std
    assert again.head.follows_scale


def test_the_papers_preset_aims_at_1() -> None:
    assert not PrototypicalRegularizer.paper(DIM, K).head.follows_scale


def test_masked_latents_have_no_scale() -> None:
    layer = far_apart()
    layer.head.prototypes.requires_grad_(False)
    mask = torch.arange(BATCH) < 40
    v = layer.head.prototypes.detach()[torch.arange(BATCH) % K]
    for _ in range(410):
        z = torch.where(mask[:, None], v + 0.1 * torch.randn(BATCH, DIM), torch.full((), 1e6))
        layer(z.requires_grad_(), mask)
    assert layer.head.std == pytest.approx(0.1, rel=0.15)
