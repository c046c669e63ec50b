"""The fitted priors and their metrics, on cases with a known answer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from examples.paper import prior_metrics, priors
from examples.paper.data import load_images, split
from examples.paper.trained import ImageData, TrainedRun
from proto_reg import PrototypeHead

K, D = 3, 6


@pytest.fixture
def latents() -> Tensor:
    """Three clusters far apart, each with a covariance of its own: (3000, 6)."""
    maps, centres = torch.randn(K, D, D), 30 * torch.eye(K, D)
    return torch.cat([centre + torch.randn(1000, D) @ some for centre, some in zip(centres, maps, strict=True)])


def head_at(z: Tensor) -> PrototypeHead:
    head = PrototypeHead(D, K, similarity="euclidean", covariance="full")
    head.place(slice(None), z.unflatten(0, (K, -1)).mean(1))
    return head


@pytest.mark.parametrize("prior", ["clusters", "gmm"])
def test_a_fitted_prior_is_that_of_the_clusters(latents: Tensor, prior: str) -> None:
    shuffled = latents[torch.randperm(len(latents))]  # as training images are
    found = priors.fit_prior(prior, shuffled, head_at(latents), K, seed=0)
    order = torch.cdist(30 * torch.eye(K, D, dtype=torch.float64), found.centres).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(found.weights, torch.full((K,), 1 / 3, dtype=torch.float64), atol=0.01, rtol=0)
    covariances = (found.factors @ found.factors.mT)[order]
    for covariance, some in zip(covariances, latents.unflatten(0, (K, -1)), strict=True):
        expected = torch.cov(some.double().T, correction=0)
        torch.testing.assert_close(covariance, expected, rtol=0.1, atol=0.1 * expected.diagonal().mean().item())


def test_the_density_and_the_clusters_are_those_of_the_head(latents: Tensor) -> None:
    head = head_at(latents)
    found = priors.of_head(head, latents)
    assert head.shapes is None  # a copy was fitted
    head.fit(latents)
    torch.testing.assert_close(found.log_prob(latents), head.mixture().log_prob(latents.double()))
    assert torch.equal(found.belonging(latents).argmax(1), head(latents).argmax(1))
    plain = priors.isotropic(head)
    torch.testing.assert_close(plain.log_prob(latents), head.mixture(std=head.std).log_prob(latents.double()))


def test_a_gmm_shares_latents_out_by_responsibility(latents: Tensor) -> None:
    found = priors.fit_gmm(latents, K, seed=0)
    normals = torch.distributions.MultivariateNormal(found.centres, scale_tril=found.factors)
    joint = normals.log_prob(latents.double()[:, None]) + found.weights.log()
    torch.testing.assert_close(found.log_prob(latents), joint.logsumexp(1))
    torch.testing.assert_close(found.belonging(latents), joint.softmax(1))


def test_few_latents_have_a_high_floor() -> None:
    """Ten latents for each covariance in ten dimensions: the density of new latents would collapse."""
    z = torch.randn(80, 10)
    found = priors.fit_gmm(z, 8, seed=0)
    smallest = torch.linalg.eigvalsh(found.factors @ found.factors.mT).amin()
    assert smallest >= 0.9 * priors.GMM_FLOORS[-1] * z.var(0).mean()
    many = torch.randn(4000, 10) * torch.logspace(0, -1.5, 10)
    found = priors.fit_gmm(many, 2, seed=0)
    assert torch.linalg.eigvalsh(found.factors @ found.factors.mT).amin() < 0.01 * many.var(0).mean()


def test_draws_have_the_shape_times_the_spread(latents: Tensor) -> None:
    found = priors.of_head(head_at(latents), latents)
    index = torch.ones(20_000, dtype=torch.int64)
    drawn = found.draw(index, Generator().manual_seed(0), spread=0.5).double()
    covariance = found.factors[1] @ found.factors[1].mT / 4
    torch.testing.assert_close(
        torch.cov(drawn.T), covariance, rtol=0.05, atol=0.05 * covariance.diagonal().max().item()
    )
    # The noise is the same at every spread.
    wide = found.draw(index, Generator().manual_seed(0), spread=1.0).double()
    torch.testing.assert_close(wide - found.centres[1], 2 * (drawn - found.centres[1]), rtol=1e-3, atol=1e-3)


def test_an_empty_cluster_has_no_class_and_no_draws(latents: Tensor) -> None:
    head = PrototypeHead(D, K + 1, similarity="euclidean")
    head.place(slice(None), torch.cat([head_at(latents).prototypes.detach(), torch.full((1, D), 1e3)]))
    found = priors.of_head(head, latents)
    assert found.weights[K] == 0
    assert found.components(1000, Generator().manual_seed(0)).max() < K
    assert found.log_prob(latents).isfinite().all()
    majority = prior_metrics.majority_classes(found.belonging(latents), torch.arange(K).repeat_interleave(1000))
    assert majority.tolist() == [0, 1, 2, -1]


def test_shares_count_for_the_majority() -> None:
    belonging = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.4, 0.6]], dtype=torch.float64)
    assert prior_metrics.majority_classes(belonging, torch.tensor([0, 1, 1, 2])).tolist() == [1, 1]
    assert prior_metrics.majority_classes(belonging, torch.tensor([0, 0, 1, 1])).tolist() == [0, 1]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return split(load_images("digits", None), "test")


def pixels_as_latents(data: ImageData, method: str = "kmeans") -> TrainedRun:
    """The identity as a model. Each class has a prototype, its mean image."""
    means = torch.stack([data.train_images[data.train_labels == c].mean(0) for c in range(10)])
    head = PrototypeHead(64, 10, similarity="euclidean")
    head.place(slice(None), means)
    head.requires_grad_(False)
    return TrainedRun(method, data, lambda x: x, lambda z: z.clamp(0, 1), lambda n, g: torch.rand(n, 64), head, 0.0)


def test_evaluation_of_a_prior(digits: ImageData) -> None:
    run = pixels_as_latents(digits)
    found, arrays = prior_metrics.evaluate_prior(run, priors.of_head(run.head, digits.train_images))
    assert all(math.isfinite(value) for value in found.values())
    assert found["test_mse"] == 0
    assert found["control"] > 0.85
    assert 0.8 < found["whitened_r2"] < 1.6  # some latents are far out: pixels are no normal
    # Training images drawn again are as near as test images. Draws of the prior are further.
    assert found["ceiling_fid"] < found["fid"]
    assert found["ceiling_precision"] > found["precision"]
    for name, better in (("control", np.greater), ("recall", np.less)):
        values = [found[f"{name}@{spread:g}"] for spread in prior_metrics.SPREADS]
        assert better(values[0], values[-1])
    assert arrays["prototypes"].shape == (10, 1, 8, 8)
    assert arrays["noise"].shape == (10, 8, 1, 8, 8)
    assert arrays["majority"].tolist() == list(range(10))


def test_draws_that_forget_the_class_have_no_control(digits: ImageData) -> None:
    run = pixels_as_latents(digits)
    fitted = priors.of_head(run.head, digits.train_images)
    mixed = priors.Mixture(fitted.weights, fitted.centres.roll(1, 0), fitted.factors @ fitted.factors.mT, run.head)
    found, _ = prior_metrics.evaluate_prior(run, mixed)
    assert found["control"] < 0.1
    assert found["whitened_r2"] > 2


def test_another_data_set_has_a_lower_density(digits: ImageData) -> None:
    run = pixels_as_latents(digits, "balanced")
    prior = priors.of_head(run.head, digits.train_images)
    noise = torch.rand(500, 64, generator=Generator().manual_seed(0))
    found = prior_metrics.out_of_distribution(run, prior, digits.test_images, "noise", noise)
    assert found["auroc: noise"] > 0.99
    assert found["auroc, N(v, I): noise"] > 0.9
    other = prior_metrics.out_of_distribution(replace(run, method="kmeans"), prior, digits.test_images, "noise", noise)
    assert other == {"auroc: noise": found["auroc: noise"]}  # N(v, I) is the aim of ours alone
