"""The layer's promises to other tools: compilers, exporters, checkpoints, averages and precisions."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from conftest import untracked
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from proto_reg import AnchoredMMDLoss, LatentQueue, PrototypeHead, PrototypicalRegularizer, Schedule, SinkhornAssigner

PIXELS, DIM, K, BATCH = 12, 8, 5, 32


def everything() -> dict:
    """Options with state and schedules. Each layer needs new ones."""
    schedule = Schedule(warmup_steps=1, mmd_steps=1, ramp_steps=2, temperature=(0.3, 0.1), temperature_steps=4)
    return {"queue": LatentQueue(50, DIM), "schedule": schedule}


class Autoencoder(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(PIXELS, DIM), nn.Linear(DIM, PIXELS)
        self.regularizer = PrototypicalRegularizer(DIM, K, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.regularizer(self.encoder(x))[0])


class Assigning(nn.Module):
    """An encoder with the layer, which assigns latents to prototypes."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.encoder, self.regularizer = nn.Linear(PIXELS, DIM), PrototypicalRegularizer(DIM, K, **options)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z, info = self.regularizer(self.encoder(x))
        return z, info.scores, info.assignments


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    loss = (model(x) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def assert_equal_state(ours: nn.Module, theirs: nn.Module) -> None:
    first, second = ours.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "masked"), [("balanced", False), ("weighted", True)])
def test_compiles_as_one_graph_with_everything_on(mode: str, masked: bool) -> None:
    torch._dynamo.reset()
    eager = PrototypicalRegularizer(DIM, K, mode=mode, **everything()).double()
    inside = copy.deepcopy(eager)
    compiled = torch.compile(inside, fullgraph=True)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.5) for layer in (eager, inside)]
    for _ in range(5):
        z, g = torch.randn(2, BATCH, DIM, dtype=torch.float64)
        mask = torch.rand(BATCH) > 0.2 if masked else None
        results = []
        for call, layer, optimizer in zip((eager, compiled), (eager, inside), optimizers, strict=True):
            leaf = z.clone().requires_grad_()
            out, info = call(leaf, mask)
            ((out * g).sum() + info.loss).backward()
            results.append([leaf.grad, layer.head.prototypes.grad.clone(), info.loss.detach()])
            optimizer.step()
            optimizer.zero_grad()
            results[-1] += [value.clone() for value in layer.state_dict().values()]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


OPEN = {"named": torch.export.Dim("batch"), "auto": torch.export.Dim.AUTO}
EXPORTED = {
    "plain": {},
    "everything": everything(),
    "few": {"mmd": AnchoredMMDLoss(max_tokens=16)},
    "isolate": {"assigner": SinkhornAssigner(marginals=[0.2] * K, nan_policy="isolate", tol=1e-3)},
    "features": {"mmd": AnchoredMMDLoss(features=8)},
    "sampled": {"mmd": AnchoredMMDLoss(target="sampled")},
    "maps": {"layout": "b d n"},
}


@pytest.mark.slow
@pytest.mark.parametrize("batch", OPEN)
@pytest.mark.parametrize("options", EXPORTED)
def test_torch_export(options: str, batch: str, backend: str) -> None:
    """The exported program takes any number of latents. ``max_tokens`` is no bound."""
    model = Assigning(**EXPORTED[options]).eval()
    if options == "maps":
        model.encoder = nn.Conv1d(PIXELS, DIM, 1)
    shape = (PIXELS, 3) if options == "maps" else (PIXELS,)
    program = torch.export.export(model, (torch.rand(7, *shape),), dynamic_shapes=({0: OPEN[batch]},))
    (bounds,) = program.range_constraints.values()
    assert bounds.upper == torch.utils._sympy.numbers.int_oo
    for rows in (1, 33, 5000):
        x = torch.rand(rows, *shape)
        for ours, theirs in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_an_exported_loss_is_that_of_all_latents() -> None:
    model = PrototypicalRegularizer(DIM, K, mmd=AnchoredMMDLoss(max_tokens=8)).eval()
    program = torch.export.export(model, (torch.rand(7, DIM),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    model.mmd.max_tokens, z = BATCH, torch.randn(BATCH, DIM)
    for ours, theirs in zip(program.module()(z)[1], model(z)[1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, everything()], ids=["plain", "everything"])
@pytest.mark.filterwarnings("ignore")  # warnings of the exporter itself
def test_onnx(options: dict, tmp_path: Path, backend: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Assigning(**options).eval()
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model, (torch.rand(7, PIXELS),), dynamo=True, dynamic_shapes={"x": {0: batch}}, verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for rows in (33, 5000):
        x = torch.rand(rows, PIXELS)
        outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for ours, theirs in zip(outputs, model(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        everything(),
        {"mmd": AnchoredMMDLoss(max_tokens=16)},
        {"assigner": SinkhornAssigner(marginals=[0.2] * K, nan_policy="isolate")},
        {"mmd": AnchoredMMDLoss(target="sampled")},
        {"head": PrototypeHead(DIM, K, similarity="euclidean")},
    ],
    ids=["plain", "everything", "max_tokens", "isolate", "sampled", "euclidean"],
)
def test_torch_func_with_tracking_off(options: dict) -> None:
    layer = PrototypicalRegularizer(DIM, K, mode="weighted", **options).double()
    for _ in range(3):
        layer(torch.randn(BATCH, DIM, dtype=torch.float64, requires_grad=True))
    layer.tracking = False
    before = copy.deepcopy(layer)
    z = torch.randn(BATCH, DIM, dtype=torch.float64)

    def loss(parameters: dict, z: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (z,))[1].loss

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    torch.manual_seed(1)
    (by_parameters, by_z), value = torch.func.grad_and_value(loss, argnums=(0, 1))(parameters, z)
    torch.manual_seed(1)
    leaf = z.clone().requires_grad_()
    expected = layer(leaf)[1].loss
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(by_z, leaf.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(by_parameters[name], parameter.grad)
    assert by_z.any()
    assert_equal_state(layer, before)


def test_torch_func_says_what_it_cannot_do() -> None:
    z = torch.randn(BATCH, DIM)
    layers = PrototypicalRegularizer(DIM, K, mode="weighted"), PrototypicalRegularizer(DIM, K)
    for layer in (*layers, untracked(PrototypicalRegularizer(DIM, K))):
        with pytest.raises(RuntimeError, match="expected a layer with mode='weighted' and tracking=False"):
            torch.func.grad(lambda z, layer=layer: layer(z)[0].sum())(z)
        assert layer.steps == 0
    layer = untracked(PrototypicalRegularizer(DIM, K, mode="weighted"))
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.func.jacrev(torch.func.grad(lambda z: layer(z)[1].loss), chunk_size=1)(z)


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_a_training_forward_without_tracking_changes_nothing(mode: str) -> None:
    model = Autoencoder(mode=mode, queue=LatentQueue(50, DIM), schedule=Schedule(mmd_steps=0))
    untracked(model.regularizer)
    optimizer = torch.optim.SGD([*model.encoder.parameters(), *model.decoder.parameters()], lr=0.1)
    before = copy.deepcopy(model.regularizer)
    for _ in range(3):
        step(model, optimizer, torch.rand(BATCH, PIXELS))
    assert_equal_state(model.regularizer, before)


def test_deepcopy_and_pickle_go_on_alike() -> None:
    model = Autoencoder(**everything())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, optimizer, torch.rand(BATCH, PIXELS))
    optimizer.zero_grad()
    x = torch.rand(3, BATCH, PIXELS)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model]
    for twin in twins:
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        for batch in x:
            step(twin, optimizer, batch)
        assert_equal_state(twin, twins[0])


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = Autoencoder(**everything())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, optimizer, torch.rand(BATCH, PIXELS))
    safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    loaded = Autoencoder(**everything())
    loaded.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    assert_equal_state(loaded, model)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    loaded = Autoencoder(**everything())
    assert safetensors.load_model(loaded, str(tmp_path / "model.safetensors")) == (set(), [])
    assert_equal_state(loaded, model)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_exponential_moving_average(use_buffers: bool) -> None:
    model = Autoencoder(**everything())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = None
    for _ in range(4):
        step(model, optimizer, torch.rand(BATCH, PIXELS))
        average.update_parameters(model)
        now = model.regularizer.head.prototypes.detach()
        expected = now.clone() if expected is None else expected.lerp(now, 0.5)
    inner = average.module.regularizer
    torch.testing.assert_close(inner.head.prototypes.detach(), expected)
    assert [b.dtype for b in inner.buffers()] == [b.dtype for b in model.regularizer.buffers()]
    average.eval()
    z = torch.randn(BATCH, DIM)
    assert torch.equal(inner(z)[1].assignments, inner.head(z).argmax(1))
    assert all(buffer.isfinite().all() for buffer in inner.buffers())
    counted = model.regularizer
    if not use_buffers:  # as documented
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(inner.buffers(), counted.buffers(), strict=True))
    else:
        for ours, theirs in zip(inner.buffers(), counted.buffers(), strict=True):
            ours.copy_(theirs)
        twin = copy.deepcopy(counted)
        assert inner.train()(z.requires_grad_())[1].codes.shape == twin(z)[1].codes.shape
        assert inner.steps == twin.steps == 5


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
def test_resume_in_the_middle_of_an_epoch_is_exact(mode: str) -> None:
    def build() -> tuple[Autoencoder, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = Autoencoder(mode=mode, mmd=AnchoredMMDLoss(max_tokens=24), **everything())
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    data = torch.rand(9, BATCH, PIXELS)
    straight, optimizer = build()
    for x in data:
        step(straight, optimizer, x)
    broken, optimizer = build()
    for x in data[:4]:
        step(broken, optimizer, x)
    file = io.BytesIO()
    torch.save([broken.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed, optimizer = build()
    resumed.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    for x in data[4:]:
        step(resumed, optimizer, x)
    assert_equal_state(resumed, straight)
    assert resumed.regularizer.metrics() == straight.regularizer.metrics()


def test_weights_of_zero_change_no_bit_of_clipping_and_accumulation() -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(PIXELS, DIM), nn.Linear(DIM, PIXELS))
    model = Autoencoder(prototype_weight=0.0, mmd_weight=0.0, queue=LatentQueue(20, DIM))
    model.encoder, model.decoder = copy.deepcopy(plain[0]), copy.deepcopy(plain[1])
    both = nn.ModuleList([model.encoder, model.decoder])
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (plain, model)]
    for _ in range(5):
        parts = torch.rand(3, BATCH, PIXELS)
        norms = []
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            for x in parts:
                (each(x) - x).square().mean().backward()
            norms.append(nn.utils.clip_grad_norm_(each.parameters(), 0.1))
            optimizer.step()
        assert torch.equal(*norms)
        for ours, theirs in zip(plain.parameters(), both.parameters(), strict=True):
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
            assert torch.equal(ours.grad.view(torch.int32), theirs.grad.view(torch.int32))
    assert model.regularizer.head.prototypes.grad is None


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_autocast_and_gradient_scaler(mode: str, dtype: torch.dtype, scaled: bool) -> None:
    """The gradients of a mixed-precision step equal those in float32, except for the encoder's own rounding."""
    gradients = []
    x = torch.rand(BATCH, PIXELS)
    for mixed in (False, True):
        torch.manual_seed(1)
        model = Autoencoder(mode=mode, **everything())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=mixed and scaled)
        for _ in range(5):
            with torch.autocast("cpu", dtype, enabled=mixed):
                z, info = model.regularizer(model.encoder(x))
                loss = (model.decoder(z).float() - x).square().mean()
                loss = loss + info.loss if mode == "weighted" else loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            last = [p.grad.clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
        gradients.append(torch.cat([g.flatten() for g in last]))
        assert info.scores.dtype == info.codes.dtype == info.loss.dtype == torch.float32
        assert model.regularizer.steps == 5
        assert {b.dtype for b in model.regularizer.buffers()} == {torch.float32, torch.int64}
    assert gradients[1].isfinite().all()
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_keeps_every_digit_in_half_precision(dtype: torch.dtype) -> None:
    model = Autoencoder(assigner=SinkhornAssigner(marginals=[0.1, 0.3, 0.2, 0.15, 0.25]), **everything())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, optimizer, torch.rand(BATCH, PIXELS))
    before = {name: value.clone() for name, value in model.regularizer.named_buffers()}
    model.to(dtype)
    assert model.regularizer.head.prototypes.dtype == dtype
    for name, value in model.regularizer.named_buffers():
        assert torch.equal(value, before[name]), name
    step(model, optimizer, torch.rand(BATCH, PIXELS).to(dtype))
    assert model.regularizer.metrics()["prototype_loss"] > 0
    model.to("meta")
    assert all(value.is_meta and value.dtype == before[n].dtype for n, value in model.regularizer.named_buffers())


def test_a_model_made_without_memory_begins_as_any_other() -> None:
    with torch.device("meta"):
        model = Autoencoder(**everything())
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(7)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = Autoencoder(**everything())
    for (name, buffer), expected in zip(model.named_buffers(), fresh.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(4):
            step(each, optimizer, torch.rand(BATCH, PIXELS))
    assert_equal_state(model, fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prototypes_arrive_at_their_latents_in_half_precision_too(dtype: torch.dtype) -> None:
    """A step of 2 % of the way is below bfloat16's resolution. The steps add up in the follower's own state."""
    centres = 3 * torch.eye(DIM)[:3]
    layer = PrototypicalRegularizer(DIM, 3)
    layer.head.prototypes.data.copy_(0.8 * centres)
    layer.to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    for _ in range(300):
        z = (centres.repeat(10, 1) + 0.01 * torch.randn(30, DIM)).to(dtype).requires_grad_()
        optimizer.zero_grad()
        layer(z)[0].sum().backward()
        optimizer.step()
    v = layer.head.prototypes.detach().float()
    assert (v.diagonal() - 3).abs().max() < 0.05
