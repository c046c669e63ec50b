"""VectorPrototypes in the place of vector-quantize-pytorch's VectorQuantize, with the same input and output shapes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from test_examples import run
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from proto_reg.integrations.vq import VectorPrototypes

SHAPES = {
    "single": ({}, (12, 8)),
    "sequence": ({}, (2, 9, 8)),
    "channel first": ({"channel_last": False}, (2, 8, 9)),
    "single, channel first": ({"channel_last": False}, (12, 8)),
    "image": ({"accept_image_fmap": True}, (2, 8, 3, 5)),
    "3d": ({"accept_3d_fmap": True}, (2, 8, 2, 3, 5)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("options", "shape"), SHAPES.values(), ids=SHAPES)
def test_shapes_are_those_of_vector_quantize(options: dict, shape: tuple[int, ...], training: bool) -> None:
    x = torch.randn(shape)
    theirs = VectorQuantize(dim=8, codebook_size=4, **options).train(training)
    ours = VectorPrototypes(dim=8, codebook_size=4, **options).train(training)
    (q, q_indices, q_loss), (z, indices, loss) = theirs(x), ours(x)
    assert (z.shape, indices.shape, indices.dtype) == (q.shape, q_indices.shape, q_indices.dtype)
    assert loss.shape == q_loss.shape == ()
    assert ours.codebook.shape == theirs.codebook.shape
    assert torch.equal(z, x)
    assert ours.get_codes_from_indices(indices).shape == theirs.get_codes_from_indices(q_indices).shape


@pytest.mark.parametrize(("options", "shape"), SHAPES.values(), ids=SHAPES)
def test_indices_are_the_nearest_prototypes_by_cosine_in_eval(options: dict, shape: tuple[int, ...]) -> None:
    vq, x = VectorPrototypes(8, 4, **options).eval(), torch.randn(shape)
    _, indices, _ = vq(x)
    axis = -1 if len(shape) == 2 or (len(shape) == 3 and options == {}) else 1
    rows = nn.functional.normalize(x.movedim(axis, -1), dim=-1)
    scores = rows @ nn.functional.normalize(vq.codebook, dim=1).T
    assert torch.equal(indices, scores.argmax(-1))
    codes = vq.get_codes_from_indices(indices)
    assert codes.shape == x.shape
    assert torch.equal(codes.movedim(axis, -1), vq.codebook[indices])
    assert torch.equal(codes, vq.get_output_from_indices(indices))


def test_mask() -> None:
    x, mask = torch.randn(4, 5, 8), torch.arange(5) < torch.tensor([[5], [3], [1], [5]])
    theirs, ours = VectorQuantize(dim=8, codebook_size=4), VectorPrototypes(dim=8, codebook_size=4)
    _, q_indices, _ = theirs(x, mask=mask)
    z, indices, _ = ours(x, mask=mask)
    assert torch.equal(q_indices == -1, indices == -1)
    assert torch.equal(z, torch.where(mask[:, :, None], x, 0.0))
    only, single, _ = ours(x[:, 0], mask=mask[:, 4])
    assert torch.equal(single == -1, ~mask[:, 4])
    assert torch.equal(only, torch.where(mask[:, 4:], x[:, 0], 0.0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("by", ["mask", "lens"])
def test_padding_is_what_it_is_in_vector_quantize(by: str, training: bool) -> None:
    x, lens = torch.randn(4, 6, 8), torch.tensor([6, 2, 0, 9])
    x[1, 3] = torch.nan  # padding may hold anything
    given = {"lens": lens} if by == "lens" else {"mask": torch.arange(6) < lens[:, None]}
    theirs, ours = (kind(dim=8, codebook_size=4).train(training) for kind in (VectorQuantize, VectorPrototypes))
    (q, q_indices, _), (z, indices, _) = theirs(x.nan_to_num(), **given), ours(x.requires_grad_(), **given)
    assert torch.equal(indices == -1, q_indices == -1)
    padding = (q == 0).all(2)
    assert torch.equal((z == 0).all(2), padding)
    assert torch.equal(z[~padding], x[~padding])
    z.sum().backward()
    assert not x.grad[padding].any()
    assert x.grad[~padding].isfinite().all()


@pytest.mark.parametrize("options", [{"channel_last": False}, {"accept_image_fmap": True}], ids=str)
def test_padding_where_the_latent_axis_is_not_the_last(options: dict) -> None:
    """VectorQuantize takes no mask in these two cases."""
    vq, x = VectorPrototypes(8, 4, **options), torch.randn(2, 8, 3, 5)
    x = x if "accept_image_fmap" in options else x.flatten(2)
    mask = torch.rand(x[:, 0].shape) > 0.3
    z, indices, _ = vq(x, mask=mask)
    assert torch.equal(z, torch.where(mask[:, None], x, 0.0))
    assert torch.equal(indices == -1, ~mask)
    if x.ndim == 3:
        z, indices, _ = vq(x, lens=torch.tensor([15, 4]))
        assert torch.equal((indices == -1).sum(1), torch.tensor([0, 11]))
        assert not z[1, :, 4:].any()


def test_balanced_acts_on_gradients_and_weighted_on_the_loss() -> None:
    x = torch.randn(64, 8, requires_grad=True)
    z, _, loss = VectorPrototypes(8, 4)(x)
    assert loss == 0
    (z.sum() + loss).backward()
    assert not torch.equal(x.grad, torch.ones_like(x))

    vq = VectorPrototypes(8, 4, mode="weighted")
    _, _, loss = vq(x)
    assert loss > 0
    x.grad = None
    loss.backward()
    assert x.grad.abs().sum() > 0
    assert vq.codebook.grad.abs().sum() > 0


def test_one_swapped_for_the_other_in_a_model_on_digits() -> None:
    x = torch.from_numpy(load_digits().images / 16).float().unsqueeze(1)[:1792]
    for kind in (VectorQuantize, VectorPrototypes):
        torch.manual_seed(0)
        vq = kind(dim=16, codebook_size=8, accept_image_fmap=True)
        encoder, decoder = nn.Conv2d(1, 16, 4, stride=4), nn.ConvTranspose2d(16, 1, 4, stride=4)
        model = nn.ModuleList([encoder, vq, decoder])
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for batch in [*x.split(64), *x.split(64)]:
            z, _, vq_loss = vq(encoder(batch))
            loss = nn.functional.mse_loss(decoder(z), batch)
            optimizer.zero_grad()
            (loss + vq_loss).backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], kind


def test_compiles_in_one_graph_and_saves() -> None:
    vq, x = VectorPrototypes(8, 4, accept_image_fmap=True), torch.randn(4, 8, 3, 3)
    copy = VectorPrototypes(8, 4, accept_image_fmap=True)
    copy.load_state_dict(vq.state_dict())
    z, indices, _ = torch.compile(vq, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(z, x)
    assert torch.equal(indices, copy(x)[1])


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="accept_3d_fmap: expected False with accept_image_fmap"):
        VectorPrototypes(8, 4, accept_image_fmap=True, accept_3d_fmap=True)
    with pytest.raises(TypeError, match="decay"):
        VectorPrototypes(8, 4, decay=0.8)
    with pytest.raises(ValueError, match="z: expected a 'b d h w' tensor"):
        VectorPrototypes(8, 4, accept_image_fmap=True)(torch.randn(4, 8))
    x, lens = torch.randn(4, 5, 8), torch.tensor([5, 4, 3, 2])
    with pytest.raises(ValueError, match="lens: expected None beside a mask"):
        VectorPrototypes(8, 4)(x, lens=lens, mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="lens: expected sequences"):
        VectorPrototypes(8, 4)(x[:, 0], lens=lens)
    with pytest.raises(TypeError, match="lens: expected a tensor of ints, got list"):
        VectorPrototypes(8, 4)(x, lens=[5, 4, 3, 2])
    with pytest.raises(TypeError, match=r"lens: expected a tensor of ints, got dtype torch\.float32"):
        VectorPrototypes(8, 4)(x, lens=lens.float())
    with pytest.raises(ValueError, match=r"lens: expected shape \(4,\)"):
        VectorPrototypes(8, 4)(x, lens=lens[:3])
    with pytest.raises(ValueError, match="mask: expected shape"):
        VectorPrototypes(8, 4)(torch.randn(4, 5, 8), mask=torch.ones(4, dtype=torch.bool))


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    out = run("vq_swap.py", "--epochs", "4", cwd=tmp_path)
    found = dict(re.findall(r"(\w+): test MSE (\d\.\d+)", out))
    assert float(found["VectorPrototypes"]) < float(found["VectorQuantize"]) < 0.1
    assert len(re.findall(r"perplexity \d+\.\d of 32", out)) == 2
