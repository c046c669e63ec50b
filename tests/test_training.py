"""Algorithm 1 on isolated steps, and the mixin."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import proto_reg
from proto_reg import (
    AnchoredMMDLoss,
    LatentQueue,
    PrototypicalRegularizer,
    PrototypicalTrainerMixin,
    PrototypicalTraining,
)
from proto_reg.batch import BatchShard, subsample
from proto_reg.training import frozen_batch_statistics, isolated_step

DIM, K, PIXELS = 8, 4, 12


def parts(**options) -> tuple[nn.Module, nn.Module, PrototypicalRegularizer]:
    return nn.Linear(PIXELS, DIM), nn.Linear(DIM, PIXELS), PrototypicalRegularizer.paper(DIM, K, **options)


def batches(count: int) -> list[torch.Tensor]:
    return list(torch.rand(count, 32, PIXELS))


def test_isolated_step_leaves_gradients_alone_and_skips_what_is_not_finite() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.grad = torch.full_like(model.weight, 7.0)
    before = copy.deepcopy(model.state_dict())
    loss = model(torch.ones(1, 3)).sum()
    expected = before["weight"] - torch.autograd.grad(loss, model.weight, retain_graph=True)[0]
    assert isolated_step(loss, list(model.parameters()), optimizer)
    assert torch.equal(model.weight, expected)
    assert (model.weight.grad == 7).all()
    assert model.bias.grad is None
    before = copy.deepcopy(model.state_dict())
    assert not isolated_step((model(torch.ones(1, 3)) / 0).sum(), list(model.parameters()), optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_failing_optimizer_gives_gradients_back() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        isolated_step(model(torch.ones(1, 3)).sum(), list(model.parameters()), optimizer)
    assert model.weight.grad is None


def test_algorithm_1_step_by_step() -> None:
    encoder, decoder, layer = parts()
    training = PrototypicalTraining(
        encoder, decoder, layer, warmup_epochs=0, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    by_hand = copy.deepcopy((encoder, decoder, layer))
    x = torch.rand(32, PIXELS)

    torch.manual_seed(3)  # the preset draws samples of its target
    losses = training.step(x)

    torch.manual_seed(3)
    encode, decode, reg = by_hand
    for loss, modules in (
        (lambda: reg.losses(encode(x)).prototype_loss, (encode, reg)),
        (lambda: reg.losses(encode(x)).mmd_loss, (encode,)),
        (lambda: F.binary_cross_entropy_with_logits(decode(encode(x)), x), (encode, decode)),
    ):
        parameters = [p for module in modules for p in module.parameters()]
        for p, g in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
            p.data.sub_(0.1 * g)
    for ours, theirs in zip((encoder, decoder, layer), by_hand, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    assert set(losses) == {"prototype", "mmd", "reconstruction"}
    assert all(p.grad is None for p in training.parameters())


@pytest.mark.parametrize("schedule", ["paper", "balanced"])
def test_warm_up_reconstructs_only(schedule: str) -> None:
    encoder, decoder, _ = parts()
    layer = PrototypicalRegularizer(DIM, K)
    training = PrototypicalTraining(encoder, decoder, layer, warmup_epochs=2, schedule=schedule)
    before = layer.head.prototypes.detach().clone()
    history = training.fit(batches(3), epochs=2 + 1)
    assert [set(row) for row in history[:2]] == [{"reconstruction"}] * 2
    assert set(history[2]) == {"prototype", "mmd", "reconstruction"}
    assert not torch.equal(layer.head.prototypes, before)
    assert training.epoch == 3
    assert training.fit(batches(3), epochs=3) == []


def test_warm_up_as_long_as_the_training_is_warned_of() -> None:
    training = PrototypicalTraining(*parts(), warmup_epochs=2)
    with pytest.warns(proto_reg.PrototypeWarning, match="warmup_epochs = 2 covers all 2 epochs"):
        training.fit(batches(1), epochs=2)


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_balanced_schedule_is_one_step_on_everything(mode: str) -> None:
    encoder, decoder, _ = parts()
    layer = PrototypicalRegularizer(DIM, K, mode=mode, follow_rate=0.0)
    training = PrototypicalTraining(
        encoder, decoder, layer, warmup_epochs=0, schedule="balanced", optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    by_hand = copy.deepcopy((encoder, decoder, layer))
    x = torch.rand(32, PIXELS)
    training.step(x)
    z, info = by_hand[2](by_hand[0](x))
    loss = F.binary_cross_entropy_with_logits(by_hand[1](z), x)
    (loss + info.loss if mode == "weighted" else loss).backward()
    for ours, theirs in zip((encoder, decoder, layer), by_hand, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b - 0.1 * b.grad)


def test_batch_statistics_move_once_a_batch() -> None:
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    norm = nn.BatchNorm1d(DIM)
    encoder = Counting(nn.Linear(PIXELS, DIM), norm)
    training = PrototypicalTraining(encoder, nn.Linear(DIM, PIXELS), parts()[2], warmup_epochs=0)
    moved = []
    norm.register_forward_hook(lambda *_: moved.append(norm.running_mean.clone()))
    before = norm.running_mean.clone()
    training.step(torch.rand(32, PIXELS))
    assert encoder.calls == 3
    assert torch.equal(moved[0], before)
    assert torch.equal(moved[1], before)
    assert not torch.equal(moved[2], before)
    with pytest.raises(RuntimeError), frozen_batch_statistics(encoder):
        raise RuntimeError
    assert norm.track_running_stats
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("schedule", ["paper", "balanced"])
def test_exact_resume_from_a_weights_only_checkpoint(schedule: str) -> None:
    def build() -> PrototypicalTraining:
        torch.manual_seed(1)
        return PrototypicalTraining(*parts(), warmup_epochs=1, schedule=schedule)

    data = batches(4)
    straight = build()
    torch.manual_seed(2)
    straight.fit(data, epochs=2)
    state = torch.get_rng_state()
    straight.fit(data, epochs=4)

    first = build()
    torch.manual_seed(2)
    first.fit(data, epochs=2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = build()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    torch.set_rng_state(state)
    resumed.fit(data, epochs=4)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.epoch == 4


def test_state_of_another_schedule_is_refused() -> None:
    state = PrototypicalTraining(*parts(), schedule="balanced").state_dict()
    with pytest.raises(ValueError, match="Resume with the schedule that was saved"):
        PrototypicalTraining(*parts(), schedule="paper").load_state_dict(state)


class Base:
    def __init__(self, name: str) -> None:
        self.name = name


class First(PrototypicalTrainerMixin, Base):
    pass


class Last(Base, PrototypicalTrainerMixin):
    pass


@pytest.mark.parametrize("cls", [First, Last])
def test_mixin_in_any_order(cls: type) -> None:
    trainer = cls("mine")
    with pytest.raises(RuntimeError, match="init_prototypical"):
        trainer.prototypical_step(torch.rand(32, PIXELS))
    trainer.init_prototypical(*parts(), warmup_epochs=1, reconstruction=F.mse_loss)
    assert set(trainer.prototypical_step(torch.rand(32, PIXELS))) == {"reconstruction"}
    trainer.prototypical_end_epoch()
    assert set(trainer.prototypical_step(torch.rand(32, PIXELS))) == {"prototype", "mmd", "reconstruction"}
    assert len(trainer.prototypical_fit(batches(2), epochs=2)) == 1


def test_mixin_state_is_in_a_modules_own_state_dict() -> None:
    class Trainer(PrototypicalTrainerMixin, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.init_prototypical(*parts(), warmup_epochs=0)

    trainer = Trainer()
    trainer.prototypical_step(torch.rand(32, PIXELS))
    twin = Trainer()
    twin.load_state_dict(trainer.state_dict())
    assert twin.prototypical.optimizers["mmd"].state_dict()["state"].keys() != set()
    assert torch.equal(twin.prototypical.encoder.weight, trainer.prototypical.encoder.weight)


def test_frozen_and_tied_parameters() -> None:
    encoder, decoder, layer = parts()
    decoder.weight = nn.Parameter(encoder.weight.T.detach().clone())
    encoder.bias.requires_grad_(False)
    layer.head.requires_grad_(False)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = encoder.weight

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return F.linear(z, self.weight.T)

    training = PrototypicalTraining(
        encoder, Tied(), layer, warmup_epochs=0, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    assert len(training.optimizers["reconstruction"].param_groups[0]["params"]) == 2
    prototypes, bias = layer.head.prototypes.clone(), encoder.bias.clone()
    training.step(torch.rand(32, PIXELS))
    assert torch.equal(layer.head.prototypes, prototypes)
    assert torch.equal(encoder.bias, bias)
    assert training.skipped_steps == 0


def test_the_subsample_changes_from_batch_to_batch() -> None:
    encoder, decoder, layer = parts(mmd=AnchoredMMDLoss(max_tokens=8))
    training = PrototypicalTraining(encoder, decoder, layer, warmup_epochs=0)
    batch = BatchShard.undivided(torch.rand(32, DIM), None)
    first, _ = subsample(batch, 8, layer.steps, seed=0)
    training.step(torch.rand(32, PIXELS))
    assert not torch.equal(first.sort().values, subsample(batch, 8, layer.steps, seed=0)[0].sort().values)


def test_a_vae_encoder_through_encode() -> None:
    encoder = nn.Linear(PIXELS, 2 * DIM)
    training = PrototypicalTraining(
        encoder, nn.Linear(DIM, PIXELS), parts()[2], warmup_epochs=0, encode=lambda x: encoder(x).chunk(2, 1)[0]
    )
    training.fit([(x, "label") for x in batches(2)], epochs=1)
    assert training.skipped_steps == 0
    with pytest.raises(ValueError, match="at least one batch"):
        training.fit([], epochs=2)
    with pytest.raises(TypeError, match=r"decoder: expected a torch\.nn\.Module"):
        PrototypicalTraining(encoder, lambda z: z, parts()[2])


def test_steps_are_counted_like_the_layers_own() -> None:
    encoder, decoder, layer = parts(queue=LatentQueue(40, DIM))
    training = PrototypicalTraining(encoder, decoder, layer, warmup_epochs=1)
    data = batches(3)
    for x in data:
        training.step(x)
    assert not layer.meter.counts.any()  # this was the warm-up
    training.end_epoch()
    losses = training.fit(data, epochs=2)
    seen = layer.metrics()
    assert layer.meter.counts.sum() == 3 * 32
    assert seen["mmd_loss"] == pytest.approx(losses[0]["mmd"], rel=1e-5)
    assert (int(layer.queue.filled), int(layer.steps)) == (40, 3)
    layer.revive(encoder(torch.rand(32, PIXELS)).detach(), optimizer=training.optimizers["prototype"])
