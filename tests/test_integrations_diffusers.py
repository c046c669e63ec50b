"""Prototypes in diffusers' autoencoders: train, save, load and sample. The autoencoder's own folder stays plain."""

from __future__ import annotations

import copy
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLWan, AutoencoderTiny, VQModel
from sklearn.datasets import load_digits
from test_examples import run
from torch import Tensor

from proto_reg import AnchoredMMDLoss, PrototypeHead, PrototypeWarning, Schedule, attach
from proto_reg.integrations.diffusers import PrototypicalAutoencoder


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.from_numpy(load_digits().images / 16).float().unsqueeze(1)  # (1797, 1, 8, 8)


def tiny() -> AutoencoderKL:
    """An autoencoder with maps of 4 x 4 x 4 from pictures of 8 x 8."""
    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
    )


positions = partial(PrototypicalAutoencoder, num_prototypes=6)
whole_maps = partial(PrototypicalAutoencoder, num_prototypes=6, map_size=(4, 4))
forms = pytest.mark.parametrize("form", [positions, whole_maps], ids=["positions", "maps"])


def train(model: PrototypicalAutoencoder, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> list[float]:
    losses = []
    for x in batches:
        loss = F.mse_loss(model(x).sample, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(model: PrototypicalAutoencoder) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


@forms
def test_loss_falls_and_prototypes_learn(form: partial, digits: Tensor) -> None:
    model = form(tiny())
    before = model.regularizer.head.prototypes.detach().clone()
    losses = train(model, adam(model), list(digits[:1792].split(64)))
    assert losses[-1] < 0.5 * losses[0]
    assert model.regularizer.steps == len(losses)
    assert not torch.equal(model.regularizer.head.prototypes, before)


def test_shapes_of_what_the_layer_computed(digits: Tensor) -> None:
    out = positions(tiny(), mmd=AnchoredMMDLoss(max_tokens=64))(digits[:10])
    assert out.sample.shape == (10, 1, 8, 8)
    assert out.latents.shape == (10, 4, 4, 4)
    assert out.info.scores.shape == (10, 6, 4, 4)
    assert out.info.assignments.shape == (10, 4, 4)
    out = whole_maps(tiny())(digits[:10], mask=torch.arange(10) < 8)
    assert out.latents.shape == (10, 4, 4, 4)
    assert out.info.scores.shape == (10, 6)


def test_without_weights_gradients_are_the_plain_autoencoders(digits: Tensor) -> None:
    plain, x = tiny(), digits[:16]
    F.mse_loss(plain(x, sample_posterior=False).sample, x).backward()
    for form, tolerance in ((positions, 0.0), (whole_maps, 1e-6)):  # contiguous whole maps use another convolution
        model = form(tiny(), prototype_weight=0.0, mmd_weight=0.0)
        F.mse_loss(model(x).sample, x).backward()
        for a, b in zip(plain.parameters(), model.vae.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)


@forms
def test_saved_and_loaded_is_the_same_to_the_bit_and_training_goes_on(
    form: partial, digits: Tensor, tmp_path: Path
) -> None:
    batches = list(digits[:480].split(48))
    model = form(tiny(), schedule=Schedule(warmup_steps=2), mmd_weight=0.2)
    optimizer = adam(model)
    train(model, optimizer, batches[:5])
    model.save_pretrained(tmp_path)
    loaded = PrototypicalAutoencoder.from_pretrained(tmp_path)
    assert not loaded.training
    x = digits[500:520]
    with torch.no_grad():
        ours, theirs = copy.deepcopy(model).eval()(x), loaded(x)
    assert torch.equal(ours.sample, theirs.sample)
    assert all(torch.equal(a, b) for a, b in zip(ours.info, theirs.info, strict=True))

    resumed = adam(loaded.train())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, batches[5:]) == train(loaded, resumed, batches[5:])
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_the_folder_is_still_the_plain_autoencoders(digits: Tensor, tmp_path: Path) -> None:
    model = positions(tiny())
    model.save_pretrained(tmp_path, variant="fp32")
    plain, report = AutoencoderKL.from_pretrained(tmp_path, variant="fp32", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    model.eval()
    x = digits[:4]
    with torch.no_grad():
        assert torch.equal(plain(x).sample, model(x).sample)
        loaded = PrototypicalAutoencoder.from_pretrained(tmp_path, variant="fp32", torch_dtype=torch.bfloat16)
        assert loaded(x.bfloat16()).sample.dtype == torch.bfloat16
        assert loaded.sample(2, size=(4, 4)).dtype == torch.bfloat16


def test_components_of_ones_own_come_back_by_hand(tmp_path: Path) -> None:
    def head() -> PrototypeHead:
        return PrototypeHead(4, 6, similarity="euclidean")

    model = positions(tiny(), head=head())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="head: expected the component"):
        PrototypicalAutoencoder.from_pretrained(tmp_path)
    loaded = PrototypicalAutoencoder.from_pretrained(tmp_path, head=head())
    assert loaded.regularizer.head.similarity == "euclidean"
    assert torch.equal(loaded.regularizer.head.prototypes, model.regularizer.head.prototypes)


def test_an_option_that_json_cannot_hold_leaves_no_half_a_model(tmp_path: Path) -> None:
    model = positions(tiny(), std=0.5)
    model._config["std"] = object()
    with pytest.raises(TypeError, match="JSON"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_prototypes(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="PrototypicalAutoencoder\\(vae, num_prototypes\\)"):
        PrototypicalAutoencoder.from_pretrained(tmp_path)


def test_samples_are_decoded_prototypes_and_noise_around_them() -> None:
    model = whole_maps(tiny()).eval()
    v = model.regularizer.head.prototypes.detach()
    with torch.no_grad():
        expected = model.vae.decode(v[[2, 2, 2]].reshape(3, 4, 4, 4)).sample
        assert torch.equal(model.sample(3, 2, std=0), expected)
        z = v[2] + 0.5 * torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
        expected = model.vae.decode(z.reshape(3, 4, 4, 4)).sample
        assert torch.equal(model.sample(3, 2, std=0.5, generator=torch.Generator().manual_seed(4)), expected)
        assert torch.equal(
            model.sample_like(torch.tensor([5, 0]), std=0), model.vae.decode(v[[5, 0]].reshape(2, 4, 4, 4)).sample
        )
    assert model.sample(5).shape == (5, 1, 8, 8)


def test_positions_are_drawn_one_by_one_or_like_a_real_picture(digits: Tensor) -> None:
    model = positions(tiny()).eval()
    v = model.regularizer.head.prototypes.detach()
    with torch.no_grad():
        tiled = v[3].reshape(1, 4, 1, 1).expand(2, 4, 3, 5).contiguous()
        assert torch.equal(model.sample(2, 3, size=(3, 5), std=0), model.vae.decode(tiled).sample)
        assignments = model(digits[:2]).info.assignments
        z = torch.empty(2, 4, 4, 4)
        for b, h, w in torch.cartesian_prod(*[torch.arange(n) for n in assignments.shape]):
            z[b, :, h, w] = v[assignments[b, h, w]]
        assert torch.equal(model.sample_like(assignments, std=0), model.vae.decode(z).sample)
    assert model.sample(7, size=(4, 4)).shape == (7, 1, 8, 8)
    assert model.sample_like(assignments).shape == (2, 1, 8, 8)


def test_bfloat16_by_autocast_and_throughout(digits: Tensor) -> None:
    x = digits[:64]
    model = positions(tiny())
    optimizer = adam(model)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            loss = F.mse_loss(out.sample.float(), x)
        assert out.sample.dtype == torch.bfloat16
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = positions(tiny()).bfloat16()
    F.mse_loss(model(x.bfloat16()).sample, x.bfloat16()).backward()
    assert model.regularizer.follower.sums.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients_and_one_step(digits: Tensor) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = positions(tiny(), prototype_weight=0.3)
        torch.nn.init.normal_(model.regularizer.head.prototypes, generator=torch.Generator().manual_seed(0))
        if checkpointed:
            model.vae.enable_gradient_checkpointing()
        F.mse_loss(model(digits[:32]).sample, digits[:32]).backward()
        assert model.regularizer.steps == 1
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiles_in_one_graph(digits: Tensor) -> None:
    x, compiled, eager = digits[:16], positions(tiny()), positions(tiny())
    eager.load_state_dict(compiled.state_dict())
    out = torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out.sample, eager(x).sample)
    out.sample.mean().backward()


def test_video(digits: Tensor, tmp_path: Path) -> None:
    sizes = {"base_dim": 4, "z_dim": 3, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
    vae = AutoencoderKLWan(in_channels=1, out_channels=1, **sizes)
    clips = digits[:40].unflatten(0, (8, 5)).transpose(1, 2)  # (8, 1, 5, 8, 8): five frames
    model = positions(vae, layout="b d t h w")
    out = model(clips)
    assert out.sample.shape == clips.shape
    assert out.info.assignments.shape == out.latents[:, 0].shape == (8, 3, 4, 4)
    F.mse_loss(out.sample, clips).backward()
    model.save_pretrained(tmp_path)
    loaded = PrototypicalAutoencoder.from_pretrained(tmp_path)
    assert loaded.sample(2, 1, size=(3, 4, 4)).shape == (2, 1, 5, 8, 8)
    assert loaded.sample_like(out.info.assignments).shape == clips.shape
    with torch.no_grad():
        maps = PrototypicalAutoencoder(vae, 4, map_size=(3, 4, 4), layout="b d t h w")
        assert maps(clips).info.scores.shape == (8, 4)
    assert maps.sample(2).shape == (2, 1, 5, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: positions(torch.nn.Linear(2, 2)), TypeError, "vae: expected a diffusers autoencoder, got Linear"),
        (lambda: positions(tiny(), layout="b h w"), ValueError, "layout: expected"),
        (lambda: positions(tiny()).sample(2), ValueError, "size: expected 2 numbers"),
        (lambda: positions(tiny()).sample(2, size=(4,)), ValueError, "size: expected 2 numbers"),
        (lambda: positions(tiny()).sample(2, 6, size=(4, 4)), ValueError, "prototype: expected an index in"),
        (lambda: whole_maps(tiny()).sample(2, size=(4, 4)), ValueError, "size: expected None"),
        (lambda: whole_maps(tiny()).sample(0), ValueError, "num_samples: expected"),
        (lambda: whole_maps(tiny())(torch.rand(4, 1, 16, 16)), ValueError, "map_size="),
        (lambda: whole_maps(tiny()).sample_like(torch.rand(2)), ValueError, "assignments: expected 1 axes of indices"),
        (lambda: whole_maps(tiny()).sample_like(torch.tensor([6])), ValueError, "prototype: expected an index in"),
    ],
)
def test_what_is_wrong_is_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def without_posterior(kind: str) -> torch.nn.Module:
    """Autoencoders that return latents instead of a distribution. The latents have 4 channels and half the size."""
    torch.manual_seed(1)
    if kind == "tiny":
        sizes = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8))
        blocks = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1, 1))
        return AutoencoderTiny(in_channels=1, out_channels=1, **sizes, **blocks)
    if kind == "dc":
        sizes = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 16))
        sizes |= dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), (1, 1))
        blocks = dict.fromkeys(("encoder_block_types", "decoder_block_types"), "ResBlock")
        norms = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
        scales = dict.fromkeys(("encoder_qkv_multiscales", "decoder_qkv_multiscales"), ((), ()))
        return AutoencoderDC(in_channels=1, latent_channels=4, **sizes, **blocks, **norms, **scales)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 6, "vq_embed_dim": 4}
    looks_up = {"num_vq_embeddings": 8, "lookup_from_codebook": kind == "vq that looks up"}
    spatial = (
        {"norm_type": "spatial", "block_out_channels": (32, 32), "latent_channels": 4} if kind == "vq, spatial" else {}
    )
    return VQModel(in_channels=1, out_channels=1, **blocks, **(sizes | spatial), **looks_up)


@pytest.mark.parametrize("kind", ["tiny", "dc", "vq", "vq, spatial", "vq that looks up"])
def test_autoencoders_without_a_posterior(kind: str, digits: Tensor, tmp_path: Path) -> None:
    model = positions(without_posterior(kind))
    before = model.regularizer.head.prototypes.detach().clone()
    losses = train(model, adam(model), list(digits[:960].split(48)))
    assert losses[-1] < 0.8 * losses[0]
    assert model.regularizer.steps == len(losses)
    assert not torch.equal(model.regularizer.head.prototypes, before)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # as DDP requires
    model.save_pretrained(tmp_path)
    loaded = PrototypicalAutoencoder.from_pretrained(tmp_path)
    x = digits[960:970]
    with torch.no_grad():
        ours, theirs = model.eval()(x), loaded(x)
    assert ours.latents.shape == (10, 4, 4, 4)
    assert torch.equal(ours.sample, theirs.sample)
    assert torch.equal(ours.info.assignments, theirs.info.assignments)
    assert loaded.sample(3, 2, size=(4, 4)).shape == (3, 1, 8, 8)


def test_attached_the_layer_is_told_of_what_will_not_come_back_or_learn(digits: Tensor) -> None:
    vae = without_posterior("tiny")
    with pytest.warns(PrototypeWarning, match=r"AutoencoderTiny\.from_pretrained builds .*PrototypicalAutoencoder"):
        attach(vae, "encoder", 4, 6, layout="b d h w")

    optimizer = torch.optim.Adam(vae.parameters())

    def step() -> None:
        F.mse_loss(vae(digits[:32]).sample, digits[:32]).backward()  # this rounds the latents to bytes
        optimizer.step()

    for _ in range(2):
        step()
    with pytest.warns(PrototypeWarning, match="No gradient has come back to the latents in 2 training steps"):
        step()


def test_autoencoders_that_need_more_words() -> None:
    class Nameless(torch.nn.Module):
        def encode(self, x): ...
        def decode(self, z): ...

    with pytest.raises(TypeError, match=r"latent in what Nameless\.encode\(x\) returns, got NoneType"):
        positions(Nameless(), latent_dim=8)(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match="latent_dim: expected the channels"):
        positions(Nameless())
    assert positions(Nameless(), latent_dim=8).regularizer.head.latent_dim == 8


def test_a_missing_framework_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "proto_reg.integrations.diffusers")
    with pytest.raises(ImportError, match="pip install 'proto_reg\\[diffusers\\]'"):
        import_module("proto_reg.integrations.diffusers")


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    out = run("diffusers_vae.py", "--epochs", "3", "--out", tmp_path, cwd=tmp_path)
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("epoch")]
    assert losses[-1] < 0.5 * losses[0]
    assert "purity" in out
    assert (tmp_path / "samples.png").stat().st_size > 10_000
