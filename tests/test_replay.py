"""torch.utils.checkpoint runs a forward again in the backward pass. It counts once and computes the same."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from layers import DIM, OPTIONS, layer_with
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from proto_reg import LatentNoise

PIXELS, BATCH = 12, 32
everything = pytest.mark.parametrize("options", OPTIONS)
modes = pytest.mark.parametrize("mode", ["balanced", "weighted"])
# One loss serves both modes here, and some tests call a layer several times: the layer warns of both.
pytestmark = pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")


class Model(nn.Module):
    def __init__(self, options: str = "plain", mode: str = "balanced") -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(PIXELS, DIM), nn.Sequential(nn.Linear(DIM, PIXELS), nn.Sigmoid())
        self.regularizer = layer_with(options, mode=mode, follow_rate=0.3)

    def forward(self, x: Tensor) -> Tensor:
        """The loss of ``x`` (B, PIXELS). In every mode, the layer's codes are a part of it."""
        z = self.encoder(x)
        if self.regularizer.layout.pattern == "b d n":
            z, info = self.regularizer(z.reshape(4, -1, DIM).transpose(1, 2))
            z = z.transpose(1, 2).reshape(-1, DIM)
        else:
            z, info = self.regularizer(z)
        seen = (info.codes * z.square().sum(1).mean()).square().mean()
        return (self.decoder(z) - x).square().mean() + info.loss + seen


def two(mode: str = "balanced", options: str = "queue and subsample") -> list[Model]:
    """Two equal models."""
    model = Model(options, mode)
    return [model, copy.deepcopy(model)]


def trained(model: Model, losses: Callable[[Model, Tensor], list[Tensor]], steps: int = 8) -> list[Tensor]:
    """All gradients of a training, and its last state. There is one backward pass for each of the ``losses``."""
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        for loss in losses(model, torch.rand(BATCH, PIXELS, generator=generator)):
            loss.backward()
        found += [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
    return [*found, *model.state_dict().values()]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def again(model: Model, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


@pytest.mark.warm_up
@everything
@modes
def test_a_checkpoint_changes_nothing(mode: str, options: str) -> None:
    plain, held = two(mode, options)
    torch.manual_seed(3)
    expected = trained(plain, lambda model, x: [model(x)])
    torch.manual_seed(3)
    assert_same(trained(held, lambda model, x: [again(model, x)]), expected)
    steps = 8 if plain.regularizer.tracking else 0
    assert held.regularizer.steps == steps


@everything
@modes
@pytest.mark.parametrize("order", ["first", "last", "sum", "twice"])
def test_several_forwards_before_a_backward(order: str, mode: str, options: str) -> None:
    """Each forward runs again with the state and the random draws of its own first run."""

    def losses(run: Callable[[Model, Tensor], Tensor]) -> Callable[[Model, Tensor], list[Tensor]]:
        def of(model: Model, x: Tensor) -> list[Tensor]:
            if order == "twice":  # in one checkpoint
                both = lambda x: model(x[::2]) + model(x[1::2])  # noqa: E731
                return [both(x) if run is Model.__call__ else checkpoint(both, x, use_reentrant=False)]
            parts = [run(model, part) for part in x.split(BATCH // 2)]
            return [sum(parts)] if order == "sum" else parts if order == "first" else parts[::-1]

        return of

    plain, held = two(mode, options)
    torch.manual_seed(3)
    expected = trained(plain, losses(Model.__call__))
    torch.manual_seed(3)
    assert_same(trained(held, losses(again)), expected)


def test_noise_that_ends_counts_once() -> None:
    plain = nn.Sequential(nn.Linear(PIXELS, DIM), LatentNoise(0.1, steps=5), nn.Linear(DIM, PIXELS))
    held = copy.deepcopy(plain)
    torch.manual_seed(3)
    expected = trained(plain, lambda model, x: [model(x).square().mean()])
    torch.manual_seed(3)
    assert_same(trained(held, lambda model, x: [again(model, x).square().mean()]), expected)
    assert held[1].steps_done == 8


@modes
def test_a_checkpoint_in_a_checkpoint(mode: str) -> None:
    plain, held = two(mode)
    expected = trained(plain, lambda model, x: [model(x)])
    inner = lambda model, x: checkpoint(again, model, x, use_reentrant=False)  # noqa: E731
    assert_same(trained(held, lambda model, x: [inner(model, x)]), expected)


@modes
def test_both_losses_in_a_checkpoint(mode: str) -> None:
    """Algorithm 1 computes them in this way."""

    def loss(model: Model, x: Tensor) -> Tensor:
        return model.regularizer.losses(model.encoder(x), count=True).loss + model.decoder(model.encoder(x)).mean()

    plain, held = two(mode)
    expected = trained(plain, lambda model, x: [loss(model, x)])
    held_loss = lambda model, x: [checkpoint(loss, model, x, use_reentrant=False)]  # noqa: E731
    assert_same(trained(held, held_loss), expected)
    assert held.regularizer.steps == 8


def test_other_hooks_and_a_retained_graph() -> None:
    """Other hooks on saved tensors run nothing again. A graph that is kept may run again twice."""
    plain, held = two()
    expected = trained(plain, lambda model, x: [model(x)])
    with torch.autograd.graph.save_on_cpu():
        assert_same(trained(held, lambda model, x: [model(x)]), expected)
    model, x = Model("queue and subsample"), torch.rand(BATCH, PIXELS)
    gradients = []
    loss = again(model, x)
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert_same(*gradients)
    assert model.regularizer.steps == 1


@modes
def test_the_reentrant_form_counts_the_run_that_has_a_graph(mode: str) -> None:
    """Its first run is under no_grad. The layer does not count there."""
    model, x = Model(mode=mode), torch.rand(BATCH, PIXELS, requires_grad=True)
    for _ in range(3):
        checkpoint(model, x, use_reentrant=True).backward()
    assert model.regularizer.steps == 3


def test_what_a_checkpoint_found_goes_with_it_and_is_in_no_copy() -> None:
    model, x = Model("queue"), torch.rand(BATCH, PIXELS)
    losses = [again(model, x) for _ in range(3)]
    replay = model.regularizer.replay
    assert len(replay._calls) == 3
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(twin.regularizer.replay._calls) == 0
        again(twin, x).backward()
        assert twin.regularizer.steps == 4
    sum(losses).backward()
    del losses
    gc.collect()
    assert len(replay._calls) == 0


@modes
@pytest.mark.parametrize("options", ["plain", "queue", "max_tokens", "schedules"])
@pytest.mark.parametrize("compiled", ["inside", "around"])
def test_a_compiled_layer_in_a_checkpoint_is_right_or_raises(compiled: str, options: str, mode: str) -> None:
    """A compiled graph that runs again reads state that has changed. It raises an error if this state matters."""
    torch._dynamo.reset()
    plain, held = two(mode, options)
    expected = trained(plain, lambda model, x: [model(x)], steps=3)
    if compiled == "inside":
        graph = torch.compile(held, fullgraph=True, backend="aot_eager")
        call = lambda model, x: [checkpoint(graph, x, use_reentrant=False)]  # noqa: E731
    else:
        graph = torch.compile(again, fullgraph=True, backend="aot_eager")
        call = lambda model, x: [graph(model, x)]  # noqa: E731
        if options == "plain":
            for ours, theirs in zip(trained(held, call, steps=3), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            return
    with pytest.raises(RuntimeError, match="Checkpoint the encoder without the layer"):
        trained(held, call, steps=3)
