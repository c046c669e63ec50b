"""The noise that the decoder gets in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor

from proto_reg import PrototypicalRegularizer, SinkhornAssigner
from proto_reg.functional import with_noise

DIM, K, BATCH = 8, 4, 24


@pytest.mark.parametrize("axis", [1, 2])
def test_it_is_relative_to_each_latent(axis: int) -> None:
    z = torch.randn(6, 2000, 3) * torch.logspace(-3, 3, 6)[:, None, None]
    z = z if axis == 1 else z.transpose(1, 2).contiguous()
    added = with_noise(z, 0.2, dim=axis) - z
    ratio = torch.linalg.vector_norm(added, dim=axis) / torch.linalg.vector_norm(z, dim=axis)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.2), rtol=0.1, atol=0)
    # Of the 2,000 coordinates none is preferred.
    assert torch.nn.functional.normalize(added, dim=axis).abs().max() < 0.2


def test_gradients_go_through_the_length_too() -> None:
    def seeded(z: Tensor) -> Tensor:
        torch.manual_seed(1)
        return with_noise(z, 0.3)

    z = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, z)
    # What depends on the ratio of noise to latent alone, as a decoder that normalises does, pulls no latent outwards.
    (by_z,) = torch.autograd.grad(torch.nn.functional.normalize(seeded(z)).square().mul(torch.arange(DIM)).sum(), z)
    torch.testing.assert_close((by_z * z).sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_latent_of_zeros_has_none() -> None:
    z = torch.zeros(2, DIM, requires_grad=True)
    out = with_noise(z, 0.3)
    out.sum().backward()
    assert torch.equal(out, z)
    assert torch.equal(z.grad, torch.ones(2, DIM))


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_it_is_added_behind_the_layer(mode: str) -> None:
    noisy = PrototypicalRegularizer(DIM, K, mode=mode, noise=0.3)
    plain = PrototypicalRegularizer(DIM, K, mode=mode)
    plain.load_state_dict(noisy.state_dict())
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (noisy, plain)]
    for _ in range(3):
        z, g = torch.randn(2, BATCH, DIM)
        results = []
        for layer, optimizer in zip((noisy, plain), optimizers, strict=True):
            leaf = z.clone().requires_grad_()
            torch.manual_seed(1)
            out, info = layer(leaf)
            out = out if layer is noisy else with_noise(out, 0.3)
            ((out * g).sum() + (info.loss if mode == "weighted" else 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
            results.append([out, leaf.grad, *info, *layer.state_dict().values()])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_there_is_none_at_inference() -> None:
    layer = PrototypicalRegularizer(DIM, K, noise=0.3)
    z = torch.randn(BATCH, DIM, requires_grad=True)
    with torch.no_grad():
        assert layer(z)[0] is z
    assert layer.eval()(z)[0] is z


def test_it_sets_in_with_the_regularisers_and_may_end() -> None:
    schedule = {"warmup_steps": 2, "prototype_warmup_steps": 1, "ramp_steps": 1}
    layers = [PrototypicalRegularizer(DIM, K, noise=0.3, noise_steps=steps, **schedule) for steps in (0, 5)]
    z = torch.randn(BATCH, DIM, requires_grad=True)
    sizes = torch.zeros(2, 6)
    for step in range(6):
        for layer, row in zip(layers, sizes, strict=True):
            torch.manual_seed(1)
            row[step] = (layer(z)[0] - z).detach().norm()
    share = torch.tensor([[0, 0, 1, 2, 2, 2], [0, 0, 1, 2, 2, 0]]) / 2
    torch.testing.assert_close(sizes, share * sizes.max())


def test_latents_that_do_not_count_are_returned_as_they_came() -> None:
    layer = PrototypicalRegularizer(DIM, K, noise=0.3, layout="b d h w")
    z = torch.randn(3, DIM, 4, 5, requires_grad=True)
    mask = torch.rand(3, 4, 5) > 0.4
    with torch.no_grad():
        z.movedim(1, -1)[~mask] = float("nan")
    out, _ = layer(z, mask=mask)
    out.sum().backward()
    changed = (out != z).movedim(1, -1)
    assert changed[mask].all()
    assert out.movedim(1, -1)[~mask].isnan().all()
    assert (z.grad.movedim(1, -1)[~mask] == 1).all()
    assert z.grad.isfinite().all()


def test_a_latent_that_is_isolated_reaches_nothing() -> None:
    layer = PrototypicalRegularizer(DIM, K, noise=0.3, assigner=SinkhornAssigner(nan_policy="isolate"))
    z = torch.randn(BATCH, DIM)
    z[3] = float("nan")
    z.requires_grad_()
    out, _ = layer(z)
    out[torch.arange(BATCH) != 3].sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": 1}, {"noise_steps": 2}])
@inductor.patch(fallback_random=True)  # the numbers that eager torch draws
def test_it_compiles_as_one_graph(mode: str, schedule: dict) -> None:
    torch._dynamo.reset()
    eager = PrototypicalRegularizer(DIM, K, mode=mode, noise=0.3, **schedule)
    inside = copy.deepcopy(eager)
    compiled = torch.compile(inside, fullgraph=True)
    for _ in range(3):
        z, g = torch.randn(2, BATCH, DIM)
        results = []
        for call in (eager, compiled):
            leaf = z.clone().requires_grad_()
            torch.manual_seed(1)
            out, info = call(leaf)
            ((out * g).sum() + info.loss).backward()
            results.append([out.detach(), leaf.grad])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_has_the_latents_dtype(dtype: torch.dtype) -> None:
    layer = PrototypicalRegularizer(DIM, K, noise=0.3, warmup_steps=1, ramp_steps=1)
    for begun in (False, True, True):
        z = (20_000 * torch.randn(BATCH, DIM).clamp(-2, 2)).to(dtype).requires_grad_()  # in float16 |z| overflows
        out, _ = layer(z)
        out.mean().backward()
        assert out.dtype == z.grad.dtype == dtype
        assert torch.equal(out, z) != begun
        assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"size": -0.1}, ValueError, "size"),
        ({"size": "0.1"}, TypeError, "size"),
        ({"size": torch.full((DIM,), 0.1)}, ValueError, "size"),
        ({"dim": 2}, ValueError, "dim"),
        ({"mask": torch.ones(BATCH, DIM, dtype=torch.bool)}, ValueError, "mask"),
        ({"mask": torch.ones(BATCH)}, TypeError, "mask"),
    ],
)
def test_arguments_of_the_function(arguments: dict, error: type, name: str) -> None:
    with pytest.raises(error, match=f"{name}: expected"):
        with_noise(torch.randn(BATCH, DIM), **({"size": 0.1} | arguments))
    with pytest.raises(TypeError, match="z: expected"):
        with_noise(torch.ones(BATCH, DIM, dtype=torch.int64), 0.1)


@pytest.mark.parametrize(("noise", "error"), [(-0.1, ValueError), (float("nan"), ValueError), ("0.1", TypeError)])
def test_arguments_of_the_layer(noise: object, error: type) -> None:
    with pytest.raises(error, match="noise: expected"):
        PrototypicalRegularizer(DIM, K, noise=noise)
    with pytest.raises(ValueError, match="noise_steps: expected"):
        PrototypicalRegularizer(DIM, K, noise=0.1, noise_steps=-1)
