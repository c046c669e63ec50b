"""The noise on the decoder's latents in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor

from proto_reg import LatentNoise, PrototypicalRegularizer
from proto_reg.functional import with_noise

DIM, K, BATCH = 8, 4, 24


@pytest.mark.parametrize("axis", [1, 2])
def test_it_is_relative_to_each_latent(axis: int) -> None:
    z = torch.randn(6, 2000, 3) * torch.logspace(-3, 3, 6)[:, None, None]
    z = z if axis == 1 else z.transpose(1, 2).contiguous()
    added = with_noise(z, 0.2, dim=axis) - z
    ratio = torch.linalg.vector_norm(added, dim=axis) / torch.linalg.vector_norm(z, dim=axis)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.2), rtol=0.1, atol=0)
    # The noise prefers none of the 2,000 coordinates.
    assert torch.nn.functional.normalize(added, dim=axis).abs().max() < 0.2


def test_gradients_go_through_the_length_too() -> None:
    def seeded(z: Tensor) -> Tensor:
        torch.manual_seed(1)
        return with_noise(z, 0.3)

    z = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, z)
    # A decoder that normalises depends only on the ratio of noise to latent. Its loss pulls no latent outwards.
    (by_z,) = torch.autograd.grad(torch.nn.functional.normalize(seeded(z)).square().mul(torch.arange(DIM)).sum(), z)
    torch.testing.assert_close((by_z * z).sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_latent_of_zeros_has_none() -> None:
    z = torch.zeros(2, DIM, requires_grad=True)
    out = with_noise(z, 0.3)
    out.sum().backward()
    assert torch.equal(out, z)
    assert torch.equal(z.grad, torch.ones(2, DIM))


def test_the_module_is_the_function_in_training_and_nothing_else() -> None:
    noise, z = LatentNoise(0.3), torch.randn(BATCH, DIM)
    torch.manual_seed(1)
    expected = with_noise(z, 0.3)
    torch.manual_seed(1)
    assert torch.equal(noise(z), expected)
    assert noise.eval()(z) is z
    assert LatentNoise(0.0)(z) is z


def test_behind_the_layer_it_leaves_losses_and_state_alone() -> None:
    noisy, plain = PrototypicalRegularizer(DIM, K), PrototypicalRegularizer(DIM, K)
    plain.load_state_dict(noisy.state_dict())
    noise, z = LatentNoise(0.3), torch.randn(BATCH, DIM)
    found = []
    for layer in (noisy, plain):
        out, info = layer(z.clone().requires_grad_())
        (noise(out) if layer is noisy else out).sum().backward()
        found.append([*info, *layer.state_dict().values()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_it_may_end() -> None:
    noise, z = LatentNoise(0.3, steps=2), torch.randn(BATCH, DIM)
    noise.eval()(z)
    changed = [not torch.equal(noise.train()(z), z) for _ in range(3)]
    assert changed == [True, True, False]
    resumed = LatentNoise(0.3, steps=2)
    resumed.load_state_dict(noise.state_dict())
    assert torch.equal(resumed(z), z)
    resumed.reset_parameters()
    assert not torch.equal(resumed(z), z)


def test_latents_that_do_not_count_are_returned_as_they_came() -> None:
    noise = LatentNoise(0.3, layout="b d h w")
    z = torch.randn(3, DIM, 4, 5, requires_grad=True)
    mask = torch.rand(3, 4, 5) > 0.4
    with torch.no_grad():
        z.movedim(1, -1)[~mask] = float("nan")
    out = noise(z, mask=mask)
    out.sum().backward()
    changed = (out != z).movedim(1, -1)
    assert changed[mask].all()
    assert out.movedim(1, -1)[~mask].isnan().all()
    assert (z.grad.movedim(1, -1)[~mask] == 1).all()
    assert z.grad.isfinite().all()


def test_a_latent_that_is_nan_reaches_nothing() -> None:
    z = torch.randn(BATCH, DIM)
    z[3] = float("nan")
    z.requires_grad_()
    LatentNoise(0.3)(z)[torch.arange(BATCH) != 3].sum().backward()
    assert z.grad[torch.arange(BATCH) != 3].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 2])
@inductor.patch(fallback_random=True)  # draws the same numbers as eager torch
def test_it_compiles_as_one_graph(steps: int) -> None:
    torch._dynamo.reset()
    eager = LatentNoise(0.3, steps)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    for _ in range(3):
        z, g = torch.randn(2, BATCH, DIM)
        results = []
        for call in (eager, compiled):
            leaf = z.clone().requires_grad_()
            torch.manual_seed(1)
            out = call(leaf)
            (out * g).sum().backward()
            results.append([out.detach(), leaf.grad])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_has_the_latents_dtype(dtype: torch.dtype) -> None:
    noise = LatentNoise(0.3)
    z = (20_000 * torch.randn(BATCH, DIM).clamp(-2, 2)).to(dtype).requires_grad_()  # in float16 |z| overflows
    out = noise(z)
    out.mean().backward()
    assert out.dtype == z.grad.dtype == dtype
    assert not torch.equal(out, z)
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


@pytest.mark.parametrize(("size", "error"), [(-0.1, ValueError), (float("nan"), ValueError), ("0.1", TypeError)])
def test_arguments_of_the_module(size: object, error: type) -> None:
    with pytest.raises(error, match="size: expected"):
        LatentNoise(size)
    with pytest.raises(ValueError, match="steps: expected"):
        LatentNoise(0.1, -1)
    with pytest.raises(ValueError, match="z: expected a 'b d h w' tensor"):
        LatentNoise(0.1, layout="b d h w")(torch.randn(BATCH, DIM))
