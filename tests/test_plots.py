"""The content of the pictures, not their look."""

from __future__ import annotations

import pytest
import torch

from proto_reg import PrototypeHead, functional, plots


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
    figure = plots.prototypes(
        lambda z: z.sigmoid().reshape(-1, 3, 2, 2), head, indices=[3, 1], num_samples=2, spread=0.5
    )
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


def test_nearest_examples_stand_beside_their_prototype() -> None:
    head = PrototypeHead(6, 3)
    images = torch.rand(8, 1, 2, 2)
    examples = torch.tensor([[5, 2], [7, -1], [-1, -1]])
    figure = plots.nearest_examples(lambda z: z.sigmoid()[:, :4].reshape(-1, 1, 2, 2), head, images, examples)
    shown = [len(axis.images) for axis in figure.axes]
    assert shown == [1, 1, 1, 1, 1, 0, 1, 0, 0]
    second = torch.from_numpy(figure.axes[2].images[0].get_array().data)
    assert torch.equal(second, images[2, 0])
    with pytest.raises(ValueError, match=r"examples: expected indices \(3, n\) below 7"):
        plots.nearest_examples(decode, head, images[:7], examples)


def test_a_hierarchy_has_the_prototypes_as_leaves() -> None:
    head = PrototypeHead(6, 5)
    head.fit(torch.randn(60, 6))
    tree = functional.prototype_hierarchy(head)
    figure = plots.hierarchy(decode, head, tree, num_groups=2, image_shape=(1, 2, 2))
    leaves = figure.axes[1:]
    order = [int(axis.get_xlabel()) for axis in leaves]
    assert sorted(order) == list(range(5))
    for k, axis in zip(order, leaves, strict=True):
        expected = decode(head.prototypes.detach())[k].reshape(2, 2)
        torch.testing.assert_close(torch.from_numpy(axis.images[0].get_array().data), expected)
    for groups in (None, 1, 5):
        plots.hierarchy(decode, head, tree, num_groups=groups, image_shape=(1, 2, 2))
    with pytest.raises(ValueError, match="num_groups: expected at most 5"):
        plots.hierarchy(decode, head, tree, num_groups=6, image_shape=(1, 2, 2))
    with pytest.raises(ValueError, match=r"tree: expected shape \(4, 4\)"):
        plots.hierarchy(decode, head, tree[1:], image_shape=(1, 2, 2))


def test_the_choice_of_a_number_is_marked() -> None:
    counts = functional.choose_num_prototypes(torch.randn(60, 4), (1, 2, 5))
    above, below = plots.num_prototypes(counts).axes
    for axis, best in ((above, counts.by_likelihood), (below, counts.by_silhouette)):
        assert axis.lines[-1].get_xdata().tolist() == [best]
