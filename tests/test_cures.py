"""Each test causes a warning in a small training and applies the cure that it names. The warning is then gone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from proto_reg import (
    AnchoredMMDLoss,
    LatentQueue,
    PrototypeHead,
    PrototypeWarning,
    PrototypicalRegularizer,
    PrototypicalTraining,
    Schedule,
    SinkhornAssigner,
)

DIM, K, BATCH = 16, 10, 128
Encode = Callable[[nn.Module, Tensor], Tensor]


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.from_numpy(load_digits().images / 16).float().flatten(1)


def batches(x: Tensor, steps: int, size: int = BATCH) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield x[torch.randint(len(x), (size,), generator=generator)]


def warned(
    x: Tensor,
    layer: Callable[[], PrototypicalRegularizer],
    steps: int = 0,
    *,
    size: int = BATCH,
    encode: Encode = lambda encoder, x: encoder(x),
    relu: bool = False,
    linear: bool = False,
    teach: Callable[[nn.Module], list] = lambda model: list(model.parameters()),
    every: int = 1,
    before: Callable[[PrototypicalRegularizer, Tensor], object] = lambda layer, z: None,
) -> list[str]:
    """Build a layer and train an autoencoder of digits with it for ``steps`` passes. Return the warnings."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        last = [nn.ReLU()] if relu else []
        encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, DIM), *last)
        decoder = nn.Sequential(nn.Linear(DIM, 64), nn.ReLU(), nn.Linear(64, 64))
        model = nn.ModuleDict({"encoder": encoder, "layer": layer(), "decoder": decoder})
        with torch.no_grad():
            before(model["layer"], encoder(x))
        optimizer = torch.optim.Adam(teach(model), lr=1e-3)
        for i, batch in enumerate(batches(x, steps, size), start=1):
            z, info = model["layer"](encode(encoder, batch))
            likelihood = nn.functional.mse_loss if linear else nn.functional.binary_cross_entropy_with_logits
            loss = likelihood(decoder(z), batch) + (info.loss if model["layer"].mode == "weighted" else 0.0)
            loss.backward()
            if i % every == 0:
                optimizer.step()
                optimizer.zero_grad()
    return [str(warning.message) for warning in record if issubclass(warning.category, PrototypeWarning)]


def build(**options) -> Callable[[], PrototypicalRegularizer]:
    return lambda: PrototypicalRegularizer(DIM, options.pop("count", K), **options)


def says(texts: list[str], words: str) -> str:
    """The only warning with these words."""
    (text,) = [text for text in texts if words in text]
    return text


def silent(texts: list[str], words: str) -> bool:
    return not any(words in text for text in texts)


def number(text: str, name: str) -> float:
    return float(re.search(rf"{name}([\d.]+\d)", text).group(1))


def test_a_good_training_is_told_nothing(digits: Tensor) -> None:
    assert warned(digits, build(), 450) == []


def test_epsilon(digits: Tensor) -> None:
    words = "epsilon = temperature"
    assert "for example temperature / 2" in says(warned(digits, build(assigner=SinkhornAssigner(0.1))), words)
    assert silent(warned(digits, build(assigner=SinkhornAssigner(0.05)), 60), words)


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ({"schedule": Schedule(warmup_steps=100)}, {"schedule": Schedule(warmup_steps=50)}),
        ({"schedule": Schedule(mmd_steps=60, ramp_steps=40)}, {"schedule": Schedule(mmd_steps=30, ramp_steps=40)}),
    ],
    ids=str,
)
def test_warm_up(digits: Tensor, long: dict, short: dict) -> None:
    def told(options: dict) -> Callable[[], PrototypicalRegularizer]:
        def layer() -> PrototypicalRegularizer:
            built = build(**options)()
            built.expect(100)
            return built

        return layer

    assert "horten" in says(warned(digits, told(long)), "covers all 100 steps")
    assert warned(digits, told(short), 100) == []


def test_warm_up_of_algorithm_1(digits: Tensor) -> None:
    def fit(warmup_epochs: int) -> None:
        layer = PrototypicalRegularizer.paper(DIM, K)
        parts = nn.Linear(64, DIM), nn.Linear(DIM, 64), layer
        PrototypicalTraining(*parts, warmup_epochs=warmup_epochs).fit([digits[:64]], epochs=2)

    with pytest.warns(PrototypeWarning, match="Shorten the warm-up"):
        fit(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrototypeWarning)
        fit(1)


def test_thousands_of_dimensions(digits: Tensor) -> None:
    text = says(warned(digits, lambda: PrototypicalRegularizer(2048, K)), "latent_dim = 2048")
    assert "layout='b d h w'" in text and "linear bottleneck" in text
    assert warned(digits, lambda: PrototypicalRegularizer(32, K, layout="b d h w")) == []
    assert warned(digits, build()) == []


def test_few_latents(digits: Tensor) -> None:
    words = "8 latents for 10 prototypes"
    assert "larger batches, fewer prototypes or queue=LatentQueue(size, latent_dim)" in says(
        warned(digits, build(), 60, size=8), words
    )
    assert silent(warned(digits, build(), 60, size=32), words)
    assert silent(warned(digits, lambda: build(queue=LatentQueue(64, DIM))(), 60, size=8), words)
    assert silent(warned(digits, build(count=4), 60, size=8), words)


def test_latents_without_a_gradient(digits: Tensor) -> None:
    cut: Encode = lambda encoder, x: encoder(x).detach()  # noqa: E731
    assert "without detach()" in says(warned(digits, build(), 60, encode=cut), "carry no gradient")
    assert silent(warned(digits, build(), 60), "carry no gradient")


@pytest.mark.parametrize("cure", [None, "skip", "isolate"])
def test_what_is_not_finite(digits: Tensor, cure: str | None) -> None:
    """One latent of every tenth batch is NaN."""
    policy = "isolate" if cure == "isolate" else "propagate"
    layer = PrototypicalRegularizer(DIM, K, assigner=SinkhornAssigner(nan_policy=policy))
    model = nn.ModuleList([nn.Linear(64, DIM), layer, nn.Linear(DIM, 64)])
    encoder, _, decoder = model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for i, x in enumerate(batches(digits, 110), start=1):
            z = encoder(x)
            if i % 10 == 0:
                z = torch.where(torch.arange(BATCH)[:, None] == 7, torch.nan, z)
            if cure == "skip" and not z.isfinite().all():
                continue
            z, _ = layer(z)
            optimizer.zero_grad()
            finite = z.isfinite().all(1)
            nn.functional.mse_loss(decoder(z[finite]), x[finite]).backward()
            optimizer.step()
    texts = [str(warning.message) for warning in record if issubclass(warning.category, PrototypeWarning)]
    if cure is None:
        text = says(texts, "NaN or infinity")
        assert "Skip those steps" in text and "assigner=SinkhornAssigner(nan_policy='isolate')" in text
    else:
        assert silent(texts, "NaN or infinity")
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_optimizer_without_the_prototypes(digits: Tensor) -> None:
    words = "The optimizer of the encoder does not have the layer's parameters"
    without = lambda model: [*model["encoder"].parameters(), *model["decoder"].parameters()]  # noqa: E731
    for mode in ("balanced", "weighted"):
        text = says(warned(digits, build(mode=mode), 3, teach=without), words)
        assert "optimizer.add_param_group({'params': layer.parameters()})" in text
        assert silent(warned(digits, build(mode=mode), 210), words)


@pytest.mark.parametrize("every", [120, 250])
def test_accumulation_is_no_missing_optimizer(digits: Tensor, every: int) -> None:
    words = "No optimizer has touched the prototypes"
    assert silent(warned(digits, build(), 810, every=every, size=32), words)
    without = lambda model: [*model["encoder"].parameters(), *model["decoder"].parameters()]  # noqa: E731
    assert not silent(warned(digits, build(), 810, every=every, size=32, teach=without), words)


def test_no_better_than_by_chance(digits: Tensor) -> None:
    words = "no better than by chance"
    high = {"schedule": Schedule(temperature=3.0), "assigner": SinkhornAssigner(1.5)}
    text = says(warned(digits, build(**high), 410), words)
    assert "Lower the temperature, start from data (head.init_from) or use fewer prototypes" in text
    assert warned(digits, build(schedule=Schedule(temperature=0.3), assigner=SinkhornAssigner(0.15)), 410) == []


@pytest.mark.parametrize(("scores", "temperature"), [("euclidean", 0.1), ("dot", 0.1), ("dot", 0.3)])
def test_surer_than_right(digits: Tensor, scores: str, temperature: float) -> None:
    words = "surer of their prototypes than they are right"

    def layer(temperature: float) -> Callable[[], PrototypicalRegularizer]:
        options = {"schedule": Schedule(temperature=temperature), "assigner": SinkhornAssigner(temperature / 2)}
        return lambda: PrototypicalRegularizer(DIM, K, head=PrototypeHead(DIM, K, similarity=scores), **options)

    texts = warned(digits, layer(temperature), 410)
    assert silent(texts, "chance")
    higher = number(says(texts, words), "for example to ")
    assert higher > 2 * temperature
    texts = warned(digits, layer(higher), 810)
    assert silent(texts, words) and silent(texts, "chance")


def test_latents_that_are_never_negative(digits: Tensor) -> None:
    assert "without ReLU" in says(warned(digits, build(), 60, relu=True), "All latents are >= 0")
    assert silent(warned(digits, build(), 60), "All latents are >= 0")


def test_latents_far_from_prototypes(digits: Tensor) -> None:
    far: Encode = lambda encoder, x: 200 * encoder(x)  # noqa: E731
    words = "next to no gradient"
    text = says(warned(digits, build(std=1.0), 410, encode=far), words)
    assert "AnchoredMMDLoss('energy')" in text
    assert warned(digits, build(std=number(text, "std=")), 810, encode=far) == []
    # Another kernel pulls slowly. The warning that a kernel does not pull is wrong for it, and does not come.
    for kernel in ("energy", "imq"):
        texts = warned(digits, build(std=1.0, mmd=AnchoredMMDLoss(kernel)), 410, encode=far)
        assert silent(texts, words)
        assert number(says(texts, "less varied"), "std\\^2, is ") < 50


def test_latents_close_to_prototypes(digits: Tensor) -> None:
    words = "would be noise to the decoder"
    text = says(warned(digits, build(std=1.0, count=30), 410, linear=True), words)
    assert warned(digits, build(count=30, std=number(text, "std=")), 810, linear=True) == []


def test_latents_wider_than_aimed_at(digits: Tensor) -> None:
    words, options = "less varied", {"mmd_weight": 0.0, "follow_rate": 0.0}
    text = says(warned(digits, build(std=0.5, **options), 410), words)
    texts = warned(digits, build(std=number(text, "std="), **options), 410)
    assert silent(texts, words) and silent(texts, "noise to the decoder")


def test_prototypes_inside_each_others_noise(digits: Tensor) -> None:
    words = "inside each other's noise"
    text = says(warned(digits, build(std=0.6, count=30), 410, linear=True), words)
    assert "or use fewer prototypes" in text
    assert warned(digits, build(std=number(text, "std="), count=30), 810, linear=True) == []
    assert silent(warned(digits, build(std=0.6, count=10), 810, linear=True), words)
    assert "noise. Use fewer prototypes" in says(warned(digits, build(std=1.0, count=100), 410), words)
    assert warned(digits, build(count=10), 810) == []
