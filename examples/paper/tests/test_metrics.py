"""The metrics of the reproduction, on cases with a known answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.image_data import load_digits
from examples.paper import metrics, synthesis
from examples.paper.trained import ImageData, TrainedRun
from proto_reg import PrototypeHead


def image_data(train: Tensor, test: Tensor, labels: int = 10, shape: tuple[int, int, int] = (1, 8, 8)) -> ImageData:
    return ImageData("toy", shape, train, torch.arange(len(train)) % labels, test, torch.arange(len(test)) % labels)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    images = load_digits()
    return ImageData("digits", images.shape, images.train, images.train_labels, images.test, images.test_labels)


@pytest.fixture(scope="module")
def judge(digits: ImageData) -> synthesis.Judge:
    with torch.no_grad():  # as evaluation calls it
        return synthesis.judge_of(digits)


def perfect(data: ImageData, method: str = "autoencoder", head: PrototypeHead | None = None) -> TrainedRun:
    """The identity as a model. Its latents are the pixels."""

    def sample(n: int, generator: torch.Generator) -> Tensor:
        return data.train_images[torch.randperm(len(data.train_images), generator=generator)[:n]]

    x = data.test_images.clamp(0, 1)
    bce = torch.nn.functional.binary_cross_entropy(x, x).item()
    return TrainedRun(method, data, lambda x: x, lambda z: z.clamp(0, 1), sample, head, bce)


def at(points: Tensor, scores: str = "euclidean") -> PrototypeHead:
    head = PrototypeHead(points.shape[1], len(points), similarity=scores)
    head.place(slice(None), points)
    return head


def whitened(n: int, dim: int) -> Tensor:
    """A sample with a mean of exactly 0 and a covariance of exactly I."""
    x = torch.randn(n, dim, dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_distance_of_gaussians() -> None:
    x = whitened(500, 6)
    shift = torch.arange(6.0)
    assert synthesis.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert synthesis.frechet_distance(x, x + shift) == pytest.approx(shift.square().sum().item())
    # The distance between N(0, I) and N(0, s^2 I) is dim (s - 1)^2.
    assert synthesis.frechet_distance(x, 3 * x) == pytest.approx(6 * 4)


def test_precision_and_recall() -> None:
    x = torch.randn(300, 4)
    assert synthesis.precision_recall(x, x) == (1.0, 1.0)
    assert synthesis.precision_recall(x, x + 1000) == (0.0, 0.0)
    # Real images are of two kinds, and samples of one kind. All samples are real. They cover half of the real images.
    both = torch.cat([x, x + 1000])
    assert synthesis.precision_recall(both, x) == (1.0, 0.5)
    assert synthesis.precision_recall(x, both) == (0.5, 1.0)


def test_diversity_is_relative_to_the_clusters_own() -> None:
    real, clusters = torch.randn(40, 5), torch.arange(40) // 20
    samples = real.unflatten(0, (2, 20))
    assert synthesis.diversity(samples, real, clusters) == pytest.approx(1)
    assert synthesis.diversity(3 * samples + 7, real, clusters) == pytest.approx(3)
    assert synthesis.diversity(samples[:, :1].expand(2, 20, 5), real, clusters) == 0
    # A cluster of one image has no diversity to compare with. If there is no other cluster, the result is NaN.
    lonely = torch.where(torch.arange(40) == 0, 0, 1)
    assert synthesis.diversity(samples, real, lonely) > 0
    assert math.isnan(synthesis.diversity(samples[:1], real[:1], torch.zeros(1, dtype=torch.int64)))


def test_control_counts_every_prototype() -> None:
    points = 100 * torch.eye(5)
    head = at(points)

    def judge(images: Tensor) -> Tensor:
        return torch.cdist(images, points).argmin(1)

    right = torch.arange(5)
    assert synthesis.control(lambda z: z, head, right, judge) == 1
    assert synthesis.control(lambda z: z, head, right.roll(1), judge) == 0
    dead = torch.tensor([0, 1, 2, 3, -1])
    assert synthesis.control(lambda z: z, head, dead, judge) == pytest.approx(0.8)
    # If the noise is as large as the distances between prototypes, the result is near chance.
    assert synthesis.control(lambda z: z, head, right, judge, std=1e4) == pytest.approx(0.2, abs=0.05)
    wild = torch.zeros(5, 5)
    wild[0] = 1e4
    assert 0.8 < synthesis.control(lambda z: z, head, right, judge, std=wild) < 0.9


def test_noise_is_the_prototypes_own_normal() -> None:
    z = synthesis.around(at(10 * torch.eye(3)), 4000).unflatten(0, (3, 4000))
    torch.testing.assert_close(z.mean(1), 10 * torch.eye(3), atol=0.1, rtol=0)
    torch.testing.assert_close(z.std(1), torch.ones(3, 3), atol=0.05, rtol=0)


def test_the_judge_knows_digits_and_has_not_seen_the_test_images(digits: ImageData, judge: synthesis.Judge) -> None:
    assert (judge.classes(digits.test_images) == digits.test_labels).float().mean() > 0.95
    assert judge.features(digits.test_images).shape == (len(digits.test_images), synthesis.FEATURES)
    other = replace(digits, test_images=torch.rand_like(digits.test_images))
    before = torch.get_rng_state()
    again = synthesis.judge_of(other)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in judge.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_what_depends_on_the_data_alone_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "_kept", {})
    calls: list[int] = []

    def compute() -> dict[str, Tensor]:
        calls.append(1)
        return {"x": torch.ones(2)}

    data = image_data(torch.rand(20, 64), torch.rand(10, 64))
    for _ in range(2):
        assert torch.equal(synthesis.once("a", data, compute, tmp_path)["x"], torch.ones(2))
    assert len(calls) == 1
    synthesis._kept.clear()  # now the cache counts, as in another process
    synthesis.once("a", data, compute, tmp_path)
    assert len(calls) == 1
    assert len(list(tmp_path.iterdir())) == 1
    synthesis.once("a", image_data(torch.rand(20, 64), data.test_images), compute, tmp_path)
    synthesis.once("b", data, compute, None)
    assert len(calls) == 3


def test_reconstruction_of_the_identity_is_at_the_floors() -> None:
    data = image_data(torch.rand(300, 64), torch.rand(100, 64))
    found = metrics.reconstruction(perfect(data), data.test_images)
    assert found["test_mse"] == 0
    assert found["bce_excess"] == pytest.approx(0, abs=1e-6)
    assert found["test_bce"] > 0.4  # grey pixels have an entropy
    assert found["pca_mse"] == pytest.approx(0, abs=1e-10)


def test_pca_floor_is_the_tail_of_the_spectrum() -> None:
    x = torch.rand(200, 64)
    data = image_data(x, x)
    spectrum = torch.linalg.svdvals((x - x.mean(0)).double()).square() / x.numel()
    for dimensions in (3, 20):
        expected = spectrum[dimensions:].sum().item()
        assert metrics.pca_floor(data, dimensions) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["balanced", "wae"])
def test_regularity_is_null_where_latents_are_what_they_should_be(method: str) -> None:
    K, dim, n = 10, 64, 4000
    head = at(4 * torch.randn(K, dim)) if method == "balanced" else None
    anchors = head.prototypes.detach()[torch.arange(n) % K] if head else torch.zeros(n, dim)
    noise = torch.randn(n, dim)
    data = image_data(torch.rand(20, dim), anchors + noise)
    run = perfect(data, method, head)
    found = metrics.regularity(run, data.test_images, head or at(torch.zeros(K, dim)))
    assert abs(found["standardised_mmd"]) < 1.5  # the mean of ten with deviation 1
    assert found["r2_per_dim"] == pytest.approx(1, abs=0.02)
    assert found["effective_rank"] > 0.95 * dim
    assert ("separation" in found) == (head is not None)

    narrow = image_data(data.train_images, anchors + 0.5 * noise)
    found = metrics.regularity(perfect(narrow, method, head), narrow.test_images, head or at(torch.zeros(K, dim)))
    assert found["standardised_mmd"] > 100
    assert found["r2_per_dim"] == pytest.approx(0.25, abs=0.02)


def test_of_a_vae_the_draws_count_and_not_the_means() -> None:
    x = torch.zeros(4000, 64)
    run = perfect(image_data(torch.rand(20, 64), x), "vae")
    drawn = metrics.regularity(replace(run, posterior=torch.randn_like), x, at(torch.zeros(10, 64)))
    assert abs(drawn["standardised_mmd"]) < 1.5
    assert drawn["r2_per_dim"] == pytest.approx(1, abs=0.02)
    assert metrics.regularity(run, x, at(torch.zeros(10, 64))) == {}


def test_one_prior_deals_latents_out_evenly() -> None:
    scores = metrics.OnePrior(3, 4)(torch.randn(10, 3))
    assert torch.bincount(scores.argmax(1)).tolist() == [3, 3, 2, 2]


def test_purity_and_majority() -> None:
    clusters, labels = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([5, 5, 2, 7, 7, 1])
    assert metrics.purity(clusters, labels) == pytest.approx(5 / 6)
    assert metrics.majority_classes(clusters, labels, 5).tolist() == [5, 7, -1, 1, -1]


def test_clusters_that_are_the_classes() -> None:
    z, labels = torch.eye(4)[[0, 1, 2, 3, 0]], torch.tensor([3, 2, 1, 0, 3])
    data = replace(image_data(torch.rand(5, 4), z), test_labels=labels)
    found = metrics.regularity(perfect(data, "kmeans", at(torch.eye(4))), z, at(torch.eye(4)))
    assert [found[name] for name in ("purity", "acc", "nmi", "ari")] == pytest.approx([1] * 4)
    assert found["separation"] == pytest.approx(2**0.5)


def class_means(digits: ImageData) -> PrototypeHead:
    return at(torch.stack([digits.train_images[digits.train_labels == c].mean(0) for c in range(10)]))


def without_noise(data: ImageData) -> Callable[[Tensor], Tensor]:
    """A decoder that noise does not disturb. It returns the class mean nearest to ten times the latent's direction."""
    head = class_means(data)
    return lambda z: head.prototypes.detach()[
        (z / 10 @ head.prototypes.T - head.prototypes.square().sum(1) / 2).argmax(1)
    ]


def test_evaluation_of_a_run_with_prototypes(digits: ImageData, judge: synthesis.Judge) -> None:
    head = at(10 * class_means(digits).prototypes.detach())
    run = replace(perfect(digits, "balanced", head), encode=lambda x: 10 * x, decode=without_noise(digits))
    found, arrays = metrics.evaluate(run)
    assert all(math.isfinite(value) for value in found.values())
    assert found["control"] > 0.99
    assert found["prototypes_right"] == 1
    assert found["classes_covered"] == 10
    assert all(found[f"covers_{c}"] == 1 for c in range(10))
    assert found["purity"] == pytest.approx(found["acc"], abs=0.02)
    assert found["purity"] > 0.85
    assert found["fid_real"] < found["fid_reconstruction"]
    assert found["diversity"] < 0.05  # there is one picture for each class
    assert arrays["prototypes"].shape == (10, 1, 8, 8)
    assert arrays["noise"].shape == (10, metrics.DRAWN, 1, 8, 8)
    assert arrays["inputs"].shape == arrays["reconstructions"].shape == (10, 1, 8, 8)
    assert arrays["tsne"].shape == (360, 2)
    assert arrays["tsne_prototypes"].shape == (10, 2)
    assert arrays["majority"].tolist() == list(range(10))
    assert np.isfinite(arrays["tsne"]).all()


def test_evaluation_of_a_run_without_prototypes(digits: ImageData, judge: synthesis.Judge) -> None:
    found, arrays = metrics.evaluate(perfect(digits), num_prototypes=12)
    assert all(math.isfinite(value) for value in found.values())
    assert not {"purity", "acc", "nmi", "ari", "separation", "perplexity", "dead"} & set(found)
    assert found["test_mse"] == 0
    # Its samples are training images. Its reconstructions are the test images.
    assert found["fid"] == pytest.approx(0, abs=1)
    assert found["fid_reconstruction"] == pytest.approx(found["fid_real"])
    assert found["precision"] > 0.8
    assert found["recall"] > 0.8
    # Pixels with noise of variance 1 are no digits. With the clusters' own spread they are digits.
    assert found["control_fitted"] > 0.8 > 0.5 > found["control"]
    assert len(arrays["prototypes"]) == 12


def test_one_prototype(digits: ImageData, judge: synthesis.Judge) -> None:
    found, _ = metrics.evaluate(perfect(digits, "balanced", at(torch.zeros(1, 64))))
    assert "separation" not in found  # there is no other prototype
    assert found["classes_covered"] == 1
    assert all(math.isfinite(value) for value in found.values())
