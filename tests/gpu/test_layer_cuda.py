"""The layer on a GPU computes the same as on the CPU, past the ends of its schedules, and never waits for the GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from proto_reg import AnchoredMMDLoss, LatentQueue, PrototypicalRegularizer, Schedule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False")

MODES = ("balanced", "weighted")
OPTIONS = {
    "plain": {},
    "ramp": {"schedule": Schedule(warmup_steps=3, ramp_steps=5)},
    "temperature": {"schedule": Schedule(temperature=(0.3, 0.1), temperature_steps=20)},
    "queue": {"queue": LatentQueue(256, 16)},
    "subsample": {"mmd": AnchoredMMDLoss(max_tokens=64)},
}


def autoencoder(**options) -> nn.ModuleDict:
    torch.manual_seed(0)
    layer = PrototypicalRegularizer(16, 10, **copy.deepcopy(options))
    return nn.ModuleDict({"encoder": nn.Linear(20, 16), "layer": layer, "decoder": nn.Linear(16, 20)})


def data(device: str, rows: int = 128) -> Tensor:
    return torch.randn(rows, 20, generator=torch.Generator().manual_seed(1)).to(device)


def train(model: nn.ModuleDict, x: Tensor, steps: int) -> list[float]:
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        z, info = model["layer"](model["encoder"](x))
        loss = nn.functional.mse_loss(model["decoder"](z), x)
        if model["layer"].mode == "weighted":
            loss = loss + info.loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@pytest.mark.warm_up
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_training_as_on_the_cpu(mode: str, options: str) -> None:
    """The training goes through the default start of 50 steps and beyond."""
    model = autoencoder(mode=mode, **OPTIONS[options])
    twin = copy.deepcopy(model).cuda()
    expected, found = train(model, data("cpu"), 120), train(twin, data("cuda"), 120)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=5e-3, atol=1e-4)
    assert int(twin["layer"].steps) == 120
    for name, value in twin["layer"].metrics().items():
        assert value == pytest.approx(model["layer"].metrics()[name], rel=0.2, abs=1.0), name


@pytest.mark.warm_up
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_waits_for_the_device(mode: str, options: str) -> None:
    model = autoencoder(mode=mode, **OPTIONS[options]).cuda()
    x = data("cuda")
    train(model, x, 2)  # loads libraries and chooses backends
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(70):
            z, info = model["layer"](model["encoder"](x))
            loss = nn.functional.mse_loss(model["decoder"](z), x)
            (loss + info.loss if mode == "weighted" else loss).backward()
            adam.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(mode: str, dtype: torch.dtype) -> None:
    model, x = autoencoder(mode=mode).cuda(), data("cuda")
    with torch.autocast("cuda", dtype):
        z, info = model["layer"](model["encoder"](x))
        loss = nn.functional.mse_loss(model["decoder"](z), x)
    (loss + info.loss if mode == "weighted" else loss).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_compiled(mode: str) -> None:
    model, x = autoencoder(mode=mode).cuda(), data("cuda")
    twin = copy.deepcopy(model)
    step = torch.compile(lambda x: model["layer"](model["encoder"](x)), fullgraph=True)
    for _ in range(3):
        z, info = step(x)
        expected, reference = twin["layer"](twin["encoder"](x))
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(info.loss, reference.loss, rtol=1e-4, atol=1e-5)
        (z.square().mean() + (info.loss if mode == "weighted" else 0)).backward()
        (expected.square().mean() + (reference.loss if mode == "weighted" else 0)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            other = twin.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, other, rtol=1e-2, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_in_a_graph(mode: str) -> None:
    model, x = autoencoder(mode=mode).cuda(), data("cuda")

    def step() -> Tensor:
        z, info = model["layer"](model["encoder"](x))
        loss = nn.functional.mse_loss(model["decoder"](z), x)
        loss = loss + info.loss if mode == "weighted" else loss
        loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    for parameter in model.parameters():
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    counted = int(model["layer"].steps)
    graph.replay()
    graph.replay()
    assert loss.isfinite()
    assert int(model["layer"].steps) == counted + 2


def test_a_checkpoint_of_the_cpu_on_the_gpu() -> None:
    model = autoencoder()
    train(model, data("cpu"), 5)
    twin = autoencoder().cuda()
    twin.load_state_dict(model.state_dict())
    assert twin["layer"].head.sample(3, prototype=2).is_cuda
    z, _ = twin["layer"].eval()(twin["encoder"](data("cuda")))
    torch.testing.assert_close(z.cpu(), model["encoder"](data("cpu")), rtol=1e-3, atol=1e-4)
