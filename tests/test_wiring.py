"""A mistake in the wiring is told by the third training step, and nothing is told where nothing is wrong."""

from __future__ import annotations

import ast
import copy
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

import proto_reg
from proto_reg import PrototypeWarning, PrototypicalRegularizer
from proto_reg.kernels import build

DIM, K = 8, 4
ROOT = Path(__file__).resolve().parents[1]


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, DIM), nn.Linear(DIM, 12)
        self.layer = PrototypicalRegularizer(DIM, K, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, proto_reg.RegularizerOutput]:
        z, info = self.layer(self.encoder(x))
        return self.decoder(z), info


def told(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    steps: int = 3,
    parameters: Callable[[], list] | None = None,
    accumulate: int = 1,
) -> list[tuple[int, str]]:
    """Train for so many ``steps`` and return (step, warning)."""
    optimizer = torch.optim.Adam(model.parameters() if parameters is None else parameters())
    found = []
    for step in range(1, steps + 1):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            for _ in range(accumulate):
                loss_of(torch.rand(32, 12)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found += [(step, str(w.message)) for w in record if w.category is PrototypeWarning]
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_nothing_is_told_where_nothing_is_wrong(mode: str, accumulate: int) -> None:
    model = Model(mode=mode)

    def loss(x: Tensor) -> Tensor:
        y, info = model(x)
        shown = info.loss.item(), info.loss.detach() + 1, 2 * info.loss
        assert len(shown) == 3
        return F.mse_loss(y, x) + (info.loss if mode == "weighted" else 0)

    assert told(model, loss, 12, accumulate=accumulate) == []


def test_returned_latents_that_nobody_decodes() -> None:
    model = Model()

    def loss(x: Tensor) -> Tensor:
        h = model.encoder(x)
        model.layer(h)
        return F.mse_loss(model.decoder(h), x)

    ((step, text),) = told(model, loss, 12)
    assert step == 3
    assert "Decode the z that it returns" in text


def test_without_a_torch_optimizer_it_is_told_after_ten_steps() -> None:
    model, found = Model(), []
    for step in range(1, 13):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            h = model.encoder(torch.rand(32, 12))
            model.layer(h)
            model.decoder(h).square().mean().backward()
            with torch.no_grad():
                for parameter in model.encoder.parameters():
                    parameter -= 0.1 * parameter.grad
        found += [step for w in record if "Decode the z" in str(w.message)]
    assert found == [10]


def test_a_loss_that_is_missing_in_weighted_mode() -> None:
    model = Model(mode="weighted")
    ((step, text),) = told(model, lambda x: F.mse_loss(model(x)[0], x), 12)
    assert step == 3
    assert "Add info.loss to your loss" in text


@pytest.mark.parametrize("weight", [1, 0.1])
def test_a_loss_that_is_added_in_balanced_mode(weight: float) -> None:
    model = Model()

    def loss(x: Tensor) -> Tensor:
        y, info = model(x)
        total = F.mse_loss(y, x) + weight * info.loss
        assert type(total) is Tensor
        return total

    ((step, text),) = told(model, loss, 12)
    assert step == 1
    assert "in mode='balanced' it has no gradient" in text


def test_a_layer_that_the_optimizer_does_not_know() -> None:
    model = Model()
    known = [*model.encoder.parameters(), *model.decoder.parameters()]
    ((step, text),) = told(model, lambda x: F.mse_loss(model(x)[0], x), 12, lambda: known)
    assert step == 3
    assert "optimizer.add_param_group({'params': layer.parameters()})" in text


def test_frozen_prototypes_need_no_optimizer() -> None:
    model = Model(follow_rate=0)
    model.layer.head.prototypes.requires_grad_(False)
    known = [*model.encoder.parameters(), *model.decoder.parameters()]
    assert told(model, lambda x: F.mse_loss(model(x)[0], x), 12, lambda: known) == []


def test_two_optimizers_share_the_model() -> None:
    model = Model()
    decoder = torch.optim.SGD([*model.decoder.parameters(), *model.layer.parameters()], lr=0.1)

    def loss(x: Tensor) -> Tensor:
        decoder.step()
        decoder.zero_grad()
        return F.mse_loss(model(x)[0], x)

    assert told(model, loss, 12, lambda: list(model.encoder.parameters())) == []


def test_a_layer_behind_the_decoder() -> None:
    model = Model()

    def loss(x: Tensor) -> Tensor:
        y, _ = model.layer(model.decoder(model.encoder(x)))
        return F.mse_loss(y, x)

    model.layer = PrototypicalRegularizer(12, K)
    ((step, text),) = told(model, loss, 12)
    assert step == 3
    assert "Put it between encoder and decoder" in text


def test_a_frozen_decoder_is_no_mistake() -> None:
    model = Model()
    model.decoder.requires_grad_(False)
    known = [*model.encoder.parameters(), *model.layer.parameters()]
    assert told(model, lambda x: F.mse_loss(model(x)[0], x), 12, lambda: known) == []


def test_two_calls_before_one_backward_pass() -> None:
    model = Model()

    def loss(x: Tensor) -> Tensor:
        return F.mse_loss(model(x)[0], x) + F.mse_loss(model(x.flip(0))[0], x)

    ((step, text),) = told(model, loss, 12)
    assert step == 1
    assert "torch.cat" in text


def test_a_look_in_between_is_no_second_call() -> None:
    model = Model()

    def loss(x: Tensor) -> Tensor:
        model(x)  # for a picture, say
        return F.mse_loss(model(x)[0], x)

    assert told(model, loss, 12) == []


def test_forward_passes_alone_are_no_training() -> None:
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            model(torch.rand(32, 12))


def test_a_model_that_never_leaves_eval() -> None:
    model = Model().eval()
    ((step, text),) = told(model, lambda x: F.mse_loss(model(x)[0], x), 12)
    assert step == 3
    assert "model.train()" in text


def test_a_trained_model_may_be_in_eval() -> None:
    model = Model()
    told(model, lambda x: F.mse_loss(model(x)[0], x), 2)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.eval()
        assert told(twin, lambda x, twin=twin: F.mse_loss(twin(x)[0], x), 12) == []


def test_a_frozen_encoder_is_no_mistake() -> None:
    model = Model()
    model.encoder.requires_grad_(False)
    texts = told(model, lambda x: F.mse_loss(model(x)[0], x), 12)
    assert texts == []


def test_nobody_looks_after_ten_steps() -> None:
    model = Model()
    before = len(hooks)
    told(model, lambda x: F.mse_loss(model(x)[0], x), 5)
    assert len(hooks) == before + 1
    told(model, lambda x: F.mse_loss(model(x)[0], x), 6)
    assert len(hooks) == before
    assert type(model(torch.rand(32, 12))[1].loss) is Tensor


def test_a_layer_that_goes_takes_its_hook_along() -> None:
    before = len(hooks)
    model = Model()
    model(torch.rand(32, 12))
    del model
    assert len(hooks) == before


@pytest.mark.parametrize("name", ["VAE", "Net"])
def test_attach_says_that_a_kl_term_stays(name: str) -> None:
    model = type(name, (nn.Module,), {})()
    model.mu = nn.Linear(12, DIM)
    if name == "Net":
        model.fc_logvar = nn.Linear(12, DIM)
    with pytest.warns(PrototypeWarning, match=r"KL term and noise as they are.*\.0164 with both, \.0072 without"):
        proto_reg.attach(model, "mu", DIM, K)


def test_attach_to_a_method_is_explained() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mu = nn.Linear(12, DIM)

        def encode(self, x: Tensor) -> Tensor:
            return self.mu(x)

    with pytest.raises(ValueError, match=r"got 'encode', which is a method of Net.*of \['mu'\]"):
        proto_reg.attach(Net(), "encode", DIM, K)


def test_metrics_that_are_nan_say_why() -> None:
    untouched, evaluated, reset = Model(), Model(), Model()
    evaluated.eval()(torch.rand(32, 12))
    reset(torch.rand(32, 12))
    reset.layer.reset_metrics()
    for model in (untouched, evaluated, reset):
        with pytest.warns(PrototypeWarning, match="metrics: no latent was counted since the last reset"):
            assert math.isnan(model.layer.metrics()["perplexity"])
    model.layer(model.encoder(torch.rand(32, 12)))
    model.layer(model.encoder(torch.rand(32, 12)) * torch.tensor([[torch.nan]] + [[1.0]] * 31))
    with pytest.warns(PrototypeWarning, match="metrics: a loss is NaN because"):
        model.layer.metrics()


HINTED = """
import torch, warnings
from proto_reg import PrototypicalRegularizer
for _ in range(2):
    layer, z = PrototypicalRegularizer(8, 4), torch.randn(32, 8, requires_grad=True)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(120):
            layer(z)
    print(["build cpu" in str(w.message) for w in record if "Compiled kernels" in str(w.message)])
"""


@pytest.mark.parametrize("settings", [{}, {"PROTO_REG_BACKEND": "torch"}, {"CXX": "no-compiler"}], ids=str)
def test_a_hint_where_kernels_can_be_compiled_and_are_not(settings: dict[str, str], tmp_path: Path) -> None:
    if build.obstacle("cpu"):
        pytest.skip(build.obstacle("cpu"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PROTO_REG")}
    environment = kept | {"PROTO_REG_CACHE": str(tmp_path)} | settings
    run = subprocess.run([sys.executable, "-c", HINTED], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == (["[]", "[]"] if settings else ["[True]", "[]"])


TROUBLE = (Path(__file__).resolve().parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SAYS = {"warn", "say"}


def warnings_of_the_sources() -> list[str]:
    """The constant parts of every warning's text, joined by ``…``."""
    found = []
    for path in sorted([*ROOT.glob("proto_reg/**/*.py"), *ROOT.glob("integrations/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if name in SAYS and node.args:
                text = text_of(node.args[1 if name == "say" and len(node.args) > 1 else 0])
                if len(text.split()) > 4:
                    found.append(text)
    return sorted(set(found))


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(map(text_of, node.values)) if isinstance(node, ast.JoinedStr) else "…"


ENTRIES = re.findall(r"^\| (`[^|]*`) \|", TROUBLE, flags=re.MULTILINE)


@pytest.mark.parametrize("text", warnings_of_the_sources())
def test_every_warning_is_on_the_page_of_troubles(text: str) -> None:
    assert any(all(part in text for part in re.findall("`([^`]*)`", entry)) for entry in ENTRIES), text
