"""The content of the pictures, not their look."""

from __future__ import annotations

import pytest
import torch

from proto_reg import PrototypeHead, plots


def decode(z: torch.Tensor) -> torch.Tensor:
    return z[:, :4].sigmoid()


def test_prototypes_beside_samples() -> None:
    head = PrototypeHead(6, 5)
    figure = plots.prototypes(decode, head, num_samples=3, image_shape=(1, 2, 2), blocks=2)
    drawn = [axis for axis in figure.axes if axis.images]
    assert len(drawn) == 5 * 4
    first = torch.from_numpy(drawn[0].images[0].get_array().data)
    torch.testing.assert_close(first, decode(head.prototypes.detach())[0].reshape(2, 2))
    assert len([a for a in plots.prototypes(decode, head, num_samples=0, image_shape=(1, 2, 2)).axes if a.images]) == 5


def test_colour_images_and_a_choice_of_rows() -> None:
    head = PrototypeHead(12, 5)
    figure = plots.prototypes(lambda z: z.sigmoid().reshape(-1, 3, 2, 2), head, indices=[3, 1], num_samples=2, std=0.5)
    assert [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] == ["3", "1"]
    assert figure.axes[0].images[0].get_array().shape == (2, 2, 3)


def test_usage_and_latent_maps() -> None:
    head = PrototypeHead(6, 5)
    z = torch.randn(40, 6)
    assert len(plots.usage(torch.full((5,), 0.2)).axes[0].patches) == 5
    for method in ("tsne", "pca"):
        for labels in (None, torch.arange(40) % 3):
            figure = plots.latent_map(z, head, labels, method=method)
            latents, stars = figure.axes[0].collections
            assert (len(latents.get_offsets()), len(stars.get_offsets())) == (40, 5)


def test_bad_arguments() -> None:
    head = PrototypeHead(6, 5)
    with pytest.raises(ValueError, match="Pass image_shape"):
        plots.prototypes(decode, head)
    with pytest.raises(ValueError, match=r"image_shape: expected \(C, H, W\) of 4 numbers"):
        plots.prototypes(decode, head, image_shape=(1, 28, 28))
    with pytest.raises(ValueError, match=r"labels: expected shape \(8,\)"):
        plots.latent_map(torch.randn(8, 6), head, torch.zeros(3))
    with pytest.raises(ValueError, match="method: expected one of 'tsne', 'pca'"):
        plots.latent_map(torch.randn(8, 6), head, method="umap")


def test_samples_of_a_fitted_head_are_named_as_such() -> None:
    head = PrototypeHead(12, 3)
    titles = []
    for _ in range(2):
        figure = plots.prototypes(lambda z: z.sigmoid().reshape(-1, 3, 2, 2), head, num_samples=1)
        titles.append([axis.get_title() for axis in figure.axes][1])
        head.fit(torch.randn(40, 12))
    assert titles == ["N(v, I)", "N(c, S)"]
