"""The usage that a layer counts in an epoch, and the revival of dead prototypes."""

from __future__ import annotations

import math

import pytest
import torch

from proto_reg import LatentQueue, PrototypeHead, PrototypicalRegularizer
from proto_reg.functional import latent_metrics

DIM, K, BATCH = 6, 5, 40


def lived(prototypes: torch.Tensor, steps: int = 3, optimizer=torch.optim.Adam, **options):
    """A layer with these ``prototypes`` and its optimizer, after some steps on latents around the first three."""
    layer = PrototypicalRegularizer(DIM, len(prototypes), head=PrototypeHead(DIM, len(prototypes)), **options)
    layer.head.prototypes.data.copy_(prototypes)
    optimizer = optimizer(layer.parameters(), lr=1e-3)
    for _ in range(steps):
        around = prototypes[torch.randint(3, (BATCH,))]
        optimizer.zero_grad()
        layer((around + 0.1 * torch.randn(BATCH, DIM)).requires_grad_())[0].sum().backward()
        optimizer.step()
    return layer, optimizer


def spread() -> torch.Tensor:
    """Five prototypes. The last two are far from the latents."""
    return 10 * torch.cat([torch.eye(DIM)[:3], -torch.eye(DIM)[:2]])


def test_metrics_are_those_of_all_latents_since_the_reset() -> None:
    layer = PrototypicalRegularizer(DIM, K, follow_rate=0.0)
    layer(torch.randn(BATCH, DIM, requires_grad=True))
    layer.reset_metrics()
    batches = [3 * torch.randn(n, DIM) for n in (BATCH, 7, 23)]
    infos = [layer(z.requires_grad_())[1] for z in batches]
    seen = layer.metrics()
    expected = latent_metrics(torch.cat(batches).detach(), layer.head)
    for name in ("perplexity", "dead", "duplicates", "separation", "r2_per_dim"):
        assert seen[name] == pytest.approx(expected[name], rel=1e-5), name
    torch.testing.assert_close(layer.usage, expected["usage"])
    for name in ("prototype_loss", "mmd_loss"):
        assert seen[name] == pytest.approx(sum(getattr(info, name).item() for info in infos) / 3, rel=1e-5)
    assert seen["active"] == 1
    assert all(type(value) is float for value in seen.values())


@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
def test_what_does_not_count_is_not_counted() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    layer.eval()(torch.randn(BATCH, DIM))
    layer.train()
    with torch.no_grad():
        layer(torch.randn(BATCH, DIM))
    layer.losses(torch.randn(BATCH, DIM))
    nothing = layer.metrics()
    assert all(math.isnan(nothing[name]) for name in ("prototype_loss", "mmd_loss", "perplexity", "dead", "r2_per_dim"))
    assert not layer.usage.any()
    mask = torch.arange(BATCH) < 10
    layer(torch.where(mask[:, None], torch.randn(BATCH, DIM), torch.nan).requires_grad_(), mask)
    assert layer.meter.counts.sum() == 10
    assert math.isfinite(layer.metrics()["r2_per_dim"])


def test_dead_prototypes_go_where_latents_are() -> None:
    layer, optimizer = lived(spread())
    alive = layer.head.prototypes.detach().clone()[:3]
    assert layer.metrics()["dead"] == 2
    z = 20 * torch.randn(100, DIM)
    revived = layer.revive(z, optimizer=optimizer)
    assert revived.tolist() == [3, 4]
    v = layer.head.prototypes.detach()
    assert torch.equal(v[:3], alive)
    assert all((z == row).all(1).any() for row in v[3:])
    assert not layer.usage.any()  # the count starts anew


def test_the_draw_is_far_from_the_living_and_from_each_other() -> None:
    for _ in range(20):
        layer, _ = lived(spread(), steps=1)
        near = spread()[:3].repeat(30, 1)
        far = 1000 * torch.stack([torch.ones(DIM), -torch.ones(DIM)])
        layer.revive(torch.cat([near, far]))
        assert sorted(layer.head.prototypes[3:, 0].tolist()) == [-1000, 1000]


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), {"momentum_buffer"}),
        (torch.optim.AdamW, {"exp_avg", "exp_avg_sq"}),
        (torch.optim.SGD, set()),
    ],
)
def test_nobody_remembers_the_dead(optimizer, names: set[str]) -> None:
    layer, optimizer = lived(spread(), optimizer=optimizer)
    state = optimizer.state[layer.head.prototypes]
    before = {name: state[name].clone() for name in names}
    layer.follower.sums += 1
    layer.follower.weight_sums += 1
    index = layer.revive(torch.randn(50, DIM), optimizer=optimizer)
    for name in names:
        assert before[name][index].any()
        assert not state[name][index].any()
        assert torch.equal(state[name][:3], before[name][:3])
    assert not layer.follower.sums[index].any()
    assert (layer.follower.weight_sums > 0).tolist() == [True] * 3 + [False] * 2
    revived = layer.head.prototypes.detach().clone()[index]
    layer(torch.zeros(BATCH, DIM, requires_grad=True))  # nothing pulls them back to their old places
    assert torch.equal(layer.head.prototypes[index], revived)


def test_equal_draws_for_equal_generators() -> None:
    z, results = torch.randn(200, DIM), []
    for _ in range(2):
        torch.manual_seed(3)
        layer, _ = lived(spread())
        layer.revive(z, generator=torch.Generator().manual_seed(5))
        results.append(layer.head.prototypes.detach())
    assert torch.equal(*results)


def test_latents_come_from_the_queue_where_none_are_given() -> None:
    layer, _ = lived(spread(), queue=LatentQueue(64, DIM))
    held = layer.queue.latents.clone()
    layer.revive()
    assert all((held == row).all(1).any() for row in layer.head.prototypes[3:])
    assert torch.equal(layer.queue.latents, held)


def test_duplicates_are_revived_on_request_the_less_used_one() -> None:
    places = spread()
    places[2] = places[1] + 0.1
    places[3:] = spread()[2]
    for duplicates in (False, True):
        layer, _ = lived(places, steps=1)
        layer.meter.counts.copy_(torch.tensor([50, 40, 60, 70, 30]))
        assert layer.metrics()["duplicates"] == 4
        assert layer.revive(torch.randn(30, DIM), duplicates=duplicates).tolist() == ([1, 4] if duplicates else [])


def test_maps_are_taken_apart() -> None:
    layer = PrototypicalRegularizer(DIM, 3, layout="b d h w")
    layer.head.prototypes.data.copy_(10 * torch.eye(DIM)[:3])
    z = 10 * torch.eye(DIM)[0][None, :, None, None] + torch.randn(2, DIM, 3, 3)
    layer(z.requires_grad_())
    assert layer.revive(z.detach()).tolist() == [1, 2]


def test_a_failing_revival_changes_nothing() -> None:
    layer, optimizer = lived(spread())
    other = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for options, kind, words in (
        ({}, ValueError, "z: expected latents to choose from, got None, and the layer has no queue"),
        ({"z": torch.randn(1, DIM)}, ValueError, "z: expected at least 2 finite latents"),
        ({"z": torch.full((9, DIM), torch.nan)}, ValueError, "got 0"),
        ({"z": torch.randn(9, DIM + 1)}, ValueError, "with d = 6, got shape (9, 7)"),
        ({"z": torch.randn(9, DIM), "optimizer": other}, ValueError, "optimizer: expected the one that holds"),
        ({"z": torch.randn(9, DIM), "optimizer": 3}, TypeError, "optimizer: expected a torch.optim.Optimizer"),
        ({"z": torch.randn(9, DIM), "threshold": 0.5}, ValueError, "threshold: expected a share below 1/K"),
    ):
        with pytest.raises(kind) as caught:
            layer.revive(**{"optimizer": optimizer, **options})
        assert words in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.reset_metrics()
    with pytest.raises(RuntimeError, match="expected training steps since the last reset"):
        layer.revive(torch.randn(9, DIM))
