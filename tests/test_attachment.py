"""attach() puts the layer into a model that does not know about it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from proto_reg import Attachment, PrototypeHead, PrototypeWarning, PrototypicalRegularizer, Schedule, attach

DIM, K = 8, 4


class Model(nn.Module):
    """A user's model, without anything of this library."""

    def __init__(self, width: int = DIM) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, width))
        self.decoder = nn.Linear(DIM, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)[:, :DIM])


class ByHand(Model):
    """The same model, with the layer in its source."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.prototypes = PrototypicalRegularizer(DIM, K, **options)

    def forward(self, x: Tensor) -> Tensor:
        z, self.info = self.prototypes(self.encoder(x))
        return self.decoder(z)


def attached(**options) -> tuple[Model, Attachment]:
    model = Model()
    return model, attach(model, encode="encoder", latent_dim=DIM, num_prototypes=K, **options)


def train(model: nn.Module, loss_of=lambda: 0.0, steps: int = 6) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for x in torch.rand(steps, 32, 12, generator=torch.Generator().manual_seed(1)):
        loss = (model(x) - x).square().mean() + loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    # attach() puts the layer into the encoder. By hand, it is beside the encoder.
    first, second = ({k.replace("encoder.2.prot", "prot"): v for k, v in m.state_dict().items()} for m in (a, b))
    assert set(first) == set(second)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_training_equals_that_of_the_layer_in_the_source(mode: str) -> None:
    torch.manual_seed(1)
    by_hand = ByHand(mode=mode, schedule=Schedule(warmup_steps=2))
    torch.manual_seed(1)
    model, attachment = attached(mode=mode, schedule=Schedule(warmup_steps=2))
    if mode == "balanced":
        train(by_hand)
        train(model)
    else:
        train(by_hand, lambda: by_hand.info.loss)
        train(model, lambda: attachment.loss)
        assert torch.equal(attachment.loss, attachment.output.loss)
    assert attachment.layer is model.prototypes
    assert model.prototypes.steps == 6
    assert_equal_states(model, by_hand)


def test_detach_restores_the_model() -> None:
    model = Model()
    keys, x = list(model.state_dict()), torch.rand(5, 12)
    before = model(x)
    with attach(model, "encoder.2", DIM, K, name="prior") as attachment:
        assert any(key.startswith("encoder.2.prior.head") for key in model.state_dict())
        model(x)
        assert attachment.output.assignments.shape == (5,)
    assert list(model.state_dict()) == keys
    assert not model.encoder[2]._forward_hooks
    assert not hasattr(model, "prior") and not hasattr(model.encoder[2], "prior")
    assert torch.equal(model(x), before)
    attachment.detach()  # there is nothing left to remove
    attach(model, model.encoder[2], DIM, K, name="prior")


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "averaged": lambda model: AveragedModel(model).module,
}


@pytest.mark.parametrize("form", COPIES)
@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_a_copy_uses_its_own_layer(form: str, mode: str) -> None:
    model, attachment = attached(mode=mode)
    train(model, (lambda: attachment.loss) if mode == "weighted" else lambda: 0.0)
    twin = COPIES[form](model)
    theirs = Attachment.of(twin)
    assert theirs.layer is twin.prototypes is not model.prototypes
    assert_equal_states(model, twin)
    steps = model.prototypes.steps.clone()
    twin.train()(torch.rand(32, 12)).sum().backward()
    assert (model.prototypes.steps, twin.prototypes.steps) == (steps, steps + 1)
    assert model.prototypes.head.prototypes.grad is not twin.prototypes.head.prototypes.grad
    theirs.detach()
    assert not hasattr(twin, "prototypes")
    assert Attachment.of(model).layer is model.prototypes


def test_a_model_saved_whole_takes_other_hooks_in_a_new_process(tmp_path: Path) -> None:
    model, _ = attached()
    torch.save(model, tmp_path / "model.pt")
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
called = []
for _ in range(200):  # ids of hooks count from 0 in this process
    model.encoder.register_forward_hook(lambda *arguments: called.append(1))
model(torch.rand(9, 12)).sum().backward()
assert len(called) == 200 and model.prototypes.steps == 1
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_safetensors() -> None:
    model, _ = attached()
    train(model)
    stored = safetensors.torch.load(safetensors.torch.save(model.state_dict()))
    other, _ = attached()
    other.load_state_dict(stored)
    assert_equal_states(model, other)


class Pair(NamedTuple):
    mu: Tensor
    logvar: Tensor


@dataclass(frozen=True)
class Frozen:
    mu: Tensor
    logvar: Tensor


class Bag:
    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        self.mu, self.logvar = mu, logvar


FORMS = {
    "tuple": (lambda a, b: (a, b), 0, lambda out: out[0]),
    "list": (lambda a, b: [b, a], -1, lambda out: out[-1]),
    "named tuple": (Pair, 0, lambda out: out.mu),
    "named tuple by name": (Pair, "mu", lambda out: out.mu),
    "dict": (lambda a, b: {"mu": a, "logvar": b}, "mu", lambda out: out["mu"]),
    "ordered dict": (lambda a, b: OrderedDict(mu=a, logvar=b), "mu", lambda out: out["mu"]),
    "dataclass": (Frozen, "mu", lambda out: out.mu),
    "object": (Bag, "mu", lambda out: out.mu),
    "tensor": (lambda a, b: torch.cat([b, a], 1), slice(DIM, None), lambda out: out[:, DIM:]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:attach leaves the model:proto_reg.PrototypeWarning")
def test_outputs_of_other_forms(form: str) -> None:
    build, select, read = FORMS[form]

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mu, self.logvar = nn.Linear(12, DIM), nn.Linear(12, DIM)

        def forward(self, x: Tensor):
            self.given = build(self.mu(x), self.logvar(x))
            return self.given

    model = nn.Module()
    model.heads, x = Heads(), torch.rand(32, 12)
    attachment = attach(model, "heads", DIM, K, select=select)
    output = model.heads(x)
    assert type(output) is type(model.heads.given)
    assert output is not model.heads.given
    assert torch.equal(read(output), model.heads.mu(x))
    torch.testing.assert_close(attachment.output.scores, attachment.layer.head(model.heads.mu(x)).detach())
    # The output holds the regularised latent: the prototypes are in its graph.
    read(output).square().sum().backward()
    assert attachment.layer.head.prototypes.grad.abs().sum() > 0


def test_maps_of_moments() -> None:
    model = nn.Module()
    model.encoder = nn.Conv2d(1, 2 * DIM, 3)
    attachment = attach(model, "encoder", DIM, K, select=slice(DIM), layout="b d h w")
    x = torch.rand(2, 1, 6, 6)
    assert torch.equal(model.encoder(x), nn.functional.conv2d(x, model.encoder.weight, model.encoder.bias))
    assert attachment.output.assignments.shape == (2, 4, 4)


@pytest.mark.parametrize("moments", [False, True])
def test_compiles_in_one_graph(moments: bool) -> None:
    models = []
    for compiled in (False, True):
        torch.manual_seed(2)
        model = Model(2 * DIM if moments else DIM)
        attachment = attach(model, "encoder", DIM, K, select=slice(DIM) if moments else None, mode="weighted")
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        x = torch.rand(32, 12, generator=torch.Generator().manual_seed(3))
        loss = (forward(x) - x).square().mean() + attachment.loss
        loss.backward()
        models.append((model, loss, attachment.output.scores))
    (eager, first, scores), (compiled, second, other_scores) = models
    assert torch.allclose(first, second) and torch.allclose(scores, other_scores)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name
    assert compiled.prototypes.steps == 1


@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
def test_called_twice_in_a_forward_pass_is_two_steps() -> None:
    model, attachment = attached()
    loss = model(torch.rand(32, 12)).sum() + model(torch.rand(7, 12)).sum()
    assert attachment.layer.steps == 2
    assert len(attachment.output.assignments) == 7
    loss.backward()
    torch.utils.checkpoint.checkpoint(model, torch.rand(32, 12), use_reentrant=False).sum().backward()
    assert attachment.layer.steps == 3  # the backward pass runs it again, and that does not count


def test_layer_comes_to_the_models_mode_and_device() -> None:
    with torch.device("meta"):
        model = Model().eval()
    layer = attach(model, "encoder", DIM, K).layer
    assert not layer.training
    assert {t.device.type for t in [*layer.parameters(), *layer.buffers()]} == {"meta"}


def test_components_are_options() -> None:
    head = PrototypeHead(DIM, K, similarity="euclidean")
    assert attached(head=head)[1].layer.head is head


def test_errors_name_the_cure_and_change_nothing() -> None:
    model = Model()
    keys = list(model.state_dict())
    listed = nn.Module()
    listed.parts, listed.empty = nn.ModuleList([nn.Linear(2, 2)]), nn.Sequential()
    wrong = {
        "model: expected a Module": (nn.Linear, "encoder", DIM, K, {}),
        "encode: expected a submodule that computes the latent, got ModuleList": (listed, "parts", DIM, K, {}),
        "encode: expected a submodule that computes the latent, got Sequential": (listed, "empty", DIM, K, {}),
        "not wrapped yet, got OptimizedModule": (torch.compile(model), "_orig_mod.encoder", DIM, K, {}),
        r"encode: expected the name of a submodule, got 'encode'. Choose from \['encoder'": (
            model,
            "encode",
            DIM,
            K,
            {},
        ),
        "encode: expected a submodule of the model, got another": (model, nn.Linear(2, 2), DIM, K, {}),
        "select: expected an int, str or slice, got list": (model, "encoder", DIM, K, {"select": [0]}),
        "select: expected a slice without a step": (model, "encoder", DIM, K, {"select": slice(0, 8, 2)}),
        "name: expected a new attribute of the model and of 'encoder', got 'decoder'": (
            model,
            "encoder",
            DIM,
            K,
            {"name": "decoder"},
        ),
        "name: expected a new attribute of the model and of 'encoder.0', got 'bias'": (
            model,
            "encoder.0",
            DIM,
            K,
            {"name": "bias"},
        ),
        "name: expected a new attribute": (model, "encoder", DIM, K, {"name": "a.b"}),
        "num_prototypes: expected an int >= 1, got 0": (model, "encoder", DIM, 0, {}),
        "mode: expected one of": (model, "encoder", DIM, K, {"mode": "heavy"}),
    }
    for message, (where, encode, dim, k, options) in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            attach(where, encode, dim, k, **options)
    assert list(model.state_dict()) == keys and not model.encoder._forward_hooks
    with pytest.raises(ValueError, match=r"name: expected a layer that attach\(\) put into the model"):
        Attachment.of(model)
    attachment = attach(model, "encoder", DIM, K)
    with pytest.raises(RuntimeError, match="expected a forward pass first"):
        _ = attachment.loss
    with pytest.raises(ValueError, match=r"encode: expected a submodule without a layer.*detach\(\)"):
        attach(model, "encoder", DIM, K, name="second")


def test_errors_of_the_first_forward_pass() -> None:
    model = Model(width=2 * DIM)
    with attach(model, "encoder", DIM, K), pytest.raises(ValueError, match="Set layout= and latent_dim="):
        model(torch.rand(5, 12))
    for select in (0, "mu"):
        with (
            attach(model, "encoder", DIM, K, select=select),
            pytest.raises(TypeError, match=f"(select={select!r})".replace("(", r"\(").replace(")", r"\)")),
        ):
            model(torch.rand(5, 12))
    recurrent = nn.Module()
    recurrent.encoder = nn.LSTM(12, DIM)
    with attach(recurrent, "encoder", DIM, K), pytest.raises(TypeError, match=r"got tuple of 2\. Say where"):
        recurrent.encoder(torch.rand(5, 12))


class Walking(nn.Module):
    """Calls all of its children, in their order."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        for i, child in enumerate(children):
            self.add_module(f"part_{i}", child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


@pytest.mark.parametrize("select", [None, 0])
def test_an_encoder_that_calls_every_child_is_named(select: int | None) -> None:
    model = Model()
    model.encoder = Walking(nn.Linear(12, DIM))
    with attach(model, "encoder", DIM, K, select=select), pytest.raises(TypeError, match="calls every child"):
        model.encoder(torch.rand(5, 12))
    attach(model, "encoder.part_0", DIM, K)
    model(torch.rand(32, 12)).sum().backward()
    assert model.prototypes.steps == 1


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(12, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


ENCODERS = {
    "sequential": lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, DIM)),
    "nested": lambda: nn.Sequential(nn.Linear(12, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, DIM))),
    "linear": lambda: nn.Linear(12, DIM),
    "own": Inner,
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_optimizer_of_the_encoder_alone_moves_the_prototypes(kind: str) -> None:
    model = Model()
    model.encoder = ENCODERS[kind]()
    keys = list(model.state_dict())
    attachment = attach(model, "encoder", DIM, K)
    before = model.prototypes.head.prototypes.detach().clone()
    optimizers = [torch.optim.Adam(part.parameters(), lr=0.05) for part in (model.encoder, model.decoder)]
    for x in torch.rand(3, 32, 12):
        loss = (model(x) - x).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert model.prototypes.steps == 3
    assert not torch.equal(model.prototypes.head.prototypes, before)
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    layers = [m for m in model.modules() if isinstance(m, PrototypicalRegularizer)]
    assert layers == [model.prototypes] == [attachment.layer]
    attachment.detach()
    assert list(model.state_dict()) == keys


def test_a_sequential_model_and_a_dictionary_of_modules() -> None:
    for model, encode in (
        (nn.Sequential(nn.Linear(12, DIM), nn.Linear(DIM, 12)), "0"),
        (nn.ModuleDict({"encoder": nn.Linear(12, DIM), "decoder": nn.Linear(DIM, 12)}), "encoder"),
    ):
        attach(model, encode, DIM, K)
        x = torch.rand(32, 12)
        for part in model.children():
            x = part(x)
        assert x.shape == (32, 12)
        x.sum().backward()
        assert model.prototypes.head.prototypes.grad.abs().sum() > 0


def test_a_copy_of_the_encoder_alone_has_a_layer_of_its_own() -> None:
    model, attachment = attached()
    train(model)
    twin = copy.deepcopy(model.encoder)
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.encoder.parameters())
    twin(torch.rand(32, 12)).sum().backward()
    assert (Attachment.of(twin).layer.steps, attachment.layer.steps) == (7, 6)


def test_two_layers_of_one_name_are_told_apart_or_refused() -> None:
    outer = nn.Module()
    outer.a, outer.b = Model(), Model()
    first, second = attach(outer.a, "encoder", DIM, K), attach(outer.b, "encoder", DIM, K)
    assert Attachment.of(outer.a).layer is first.layer
    assert Attachment.of(outer.b).layer is second.layer
    with pytest.raises(ValueError, match="name: expected a layer"):
        Attachment.of(outer)


class Wrapper(nn.Module):
    """PEFT's wrapper for modules_to_save is like this: the original is frozen, and a copy is trained and called."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original, self.copy = original.requires_grad_(False), copy.deepcopy(original).requires_grad_()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["copy"], name)

    def forward(self, *arguments):
        return self.copy(*arguments)


def test_what_replaces_the_layer_is_called() -> None:
    model, attachment = attached()
    original = attachment.layer
    model.encoder[2].prototypes = Wrapper(original)
    train(model)
    assert (original.steps, attachment.layer.copy.steps) == (0, 6)
    assert not torch.equal(original.head.prototypes, attachment.layer.copy.head.prototypes)


def test_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, attachment = attached()
    config = peft.LoraConfig(target_modules=["encoder.0"], modules_to_save=["prototypes"])
    adapted = peft.get_peft_model(model, config)
    before = attachment.layer.head.prototypes.detach().clone()
    train(adapted)
    assert attachment.layer.steps == 6
    assert not torch.equal(attachment.layer.head.prototypes, before)
    # The layer sees the latent after the adapter has added to it.
    z = adapted.eval().encoder(torch.rand(9, 12))
    torch.testing.assert_close(attachment.output.scores, attachment.layer.head(z))
    adapted.save_pretrained(tmp_path)
    twin, theirs = attached()
    peft.PeftModel.from_pretrained(twin, tmp_path)
    assert torch.equal(theirs.layer.head.prototypes, attachment.layer.head.prototypes)
    assert theirs.layer.steps == 6


def test_an_adapter_around_the_latents_own_module_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = Model()
    attach(model, "encoder.2", DIM, K)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["encoder.2"]))
    with pytest.raises(ValueError, match=r"encode: expected 'encoder\.2' as it was, got it inside an adapter"):
        model(torch.rand(32, 12))


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_latents_without_a_gradient_are_told_within_a_few_steps(mode: str) -> None:
    model, attachment = attached(mode=mode)
    model.decoder.register_forward_pre_hook(lambda module, inputs: inputs[0].detach())
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        loss = model(torch.rand(32, 12)).square().mean() + (attachment.loss if mode == "weighted" else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            step()
    if mode == "weighted":  # the layer's own loss gives a gradient
        return
    with pytest.warns(PrototypeWarning, match="No gradient has come back to the latents in 2 training steps"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            step()


class Hub(Model, PyTorchModelHubMixin):
    """A model that is built from its arguments alone, as the hub does it."""

    def __init__(self, num_prototypes: int | None = None) -> None:
        super().__init__()
        if num_prototypes is not None:
            attach(self, "encoder", DIM, num_prototypes)


def test_a_model_of_the_hub_that_attaches_itself_comes_back(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Hub(num_prototypes=K)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = Hub.from_pretrained(tmp_path)
    assert_equal_states(model, loaded)
    x = torch.rand(9, 12)
    assert torch.equal(model.eval()(x), loaded.eval()(x))
    assert Attachment.of(loaded).layer is loaded.prototypes


def test_a_model_of_the_hub_is_told_what_comes_back_without_the_layer(tmp_path: Path) -> None:
    model = Hub()
    with pytest.warns(PrototypeWarning, match=r"Hub\.from_pretrained builds the model without the layer"):
        attach(model, "encoder", DIM, K)


def test_a_wrapped_model_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(Model())
        with pytest.raises(ValueError, match="not wrapped yet, got DistributedDataParallel"):
            attach(model, "module.encoder", DIM, K)
    finally:
        torch.distributed.destroy_process_group()
