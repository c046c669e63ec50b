"""The shapes of clusters that a head learns from latents: weights, centres and covariances."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from proto_reg import PrototypeHead, PrototypicalRegularizer

DIM, K, RANK = 6, 3, 2


def clusters(
    counts: tuple[int, ...] = (4000, 2000, 1000), **options
) -> tuple[PrototypeHead, Tensor, list[MultivariateNormal]]:
    """A head, latents around its prototypes, and the normal distributions that they were drawn from."""
    head = PrototypeHead(DIM, len(counts), similarity="euclidean", **options)
    normals, latents = [], []
    with torch.no_grad():
        head.prototypes.copy_(20 * torch.eye(len(counts), DIM))
    for v, count in zip(head.prototypes.detach().double(), counts, strict=True):
        factor = torch.randn(DIM, RANK, dtype=torch.float64)
        covariance = factor @ factor.mT + torch.diag(torch.rand(DIM, dtype=torch.float64) + 0.1)
        normals.append(MultivariateNormal(v + 0.5, covariance))
        latents.append(normals[-1].sample((count,)))
    return head, torch.cat(latents).float(), normals


def covariance(head: PrototypeHead, k: int) -> Tensor:
    shapes = head.shapes
    return shapes.factors[k] @ shapes.factors[k].mT + torch.diag(shapes.diagonals[k])


def test_it_finds_the_weights_centres_and_covariances() -> None:
    head, z, normals = clusters(rank=RANK)
    assert head.shapes is None
    head.fit(z)
    torch.testing.assert_close(head.shapes.weights, torch.tensor([4.0, 2.0, 1.0]) / 7)
    for k, normal in enumerate(normals):
        own = z[head(z).argmax(1) == k]
        torch.testing.assert_close(head.shapes.centres[k], own.mean(0))
        expected = normal.covariance_matrix.float()
        assert (covariance(head, k) - expected).norm() < 0.12 * expected.norm()


def test_samples_have_the_shape_and_spread_scales_it() -> None:
    head, z, _ = clusters(rank=RANK)
    head.fit(z)
    for spread in (1.0, 0.5):
        draws = head.sample(50_000, prototype=1, spread=spread)
        torch.testing.assert_close(draws.mean(0), head.shapes.centres[1], rtol=0, atol=0.05)
        expected = spread**2 * covariance(head, 1)
        assert (draws.T.cov() - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(head.sample(3, prototype=1, spread=0.0), head.shapes.centres[[1, 1, 1]])
    share = (head(head.sample(20_000)).argmax(1) == 0).float().mean()
    torch.testing.assert_close(share, torch.tensor(4 / 7), rtol=0, atol=0.02)


def test_a_given_std_is_the_round_distribution_still() -> None:
    head, z, _ = clusters()
    torch.manual_seed(1)
    before = head.sample(5, prototype=2, std=0.7)
    head.fit(z)
    torch.manual_seed(1)
    assert torch.equal(head.sample(5, prototype=2, std=0.7), before)
    assert torch.equal(head.sample(2, prototype=2, std=0), head.prototypes[[2, 2]])
    assert head.mixture(std=0.7).shapes is None


@pytest.mark.parametrize(
    "options", [{"covariance": "diagonal"}, {"covariance": "full"}, {"rank": RANK}, {"rank": 50}], ids=str
)
def test_the_mixture_is_that_of_torchs_normals(options: dict) -> None:
    head, z, _ = clusters(**options)
    head.double().fit(z.double())
    mixture = head.mixture(spread=1.3)
    values = mixture.sample((4, 5))
    normals = MultivariateNormal(head.shapes.centres, 1.3**2 * torch.stack([covariance(head, k) for k in range(K)]))
    joint = normals.log_prob(values[..., None, :]) + head.shapes.weights.log()
    torch.testing.assert_close(mixture.log_prob(values), joint.logsumexp(-1))
    torch.testing.assert_close(mixture.responsibilities(values), joint.softmax(-1))
    assert mixture.log_prob(values).mean() > head.mixture(std=1.0).log_prob(values).mean()


def test_a_small_cluster_borrows_and_an_empty_one_is_never_drawn() -> None:
    head, z, _ = clusters((4000, 2, 0), rank=RANK)
    head.fit(z)
    assert head.shapes.weights[2] == 0
    assert all(torch.linalg.eigvalsh(covariance(head, k)).min() > 0.01 for k in range(K))
    torch.testing.assert_close(covariance(head, 2), covariance(head, 0), rtol=0.1, atol=0.05)
    assert torch.equal(head.shapes.centres[2], head.prototypes[2])
    assert (head(head.sample(2000)).argmax(1) != 2).all()
    assert head.mixture().log_prob(z).isfinite().all()


def test_latents_that_coincide() -> None:
    head, z, _ = clusters()
    head.fit(z[:1].repeat(20, 1))
    assert head.sample(10).isfinite().all()
    assert head.mixture().log_prob(z).isfinite().logical_or(head.mixture().log_prob(z) == -torch.inf).all()


def test_the_state_has_them_and_a_state_without_has_none() -> None:
    head, z, _ = clusters()
    plain = copy.deepcopy(head.state_dict())
    head.fit(z)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), PrototypeHead(DIM, K, similarity="euclidean")):
        twin.load_state_dict(head.state_dict())
        for ours, theirs in zip(twin.shapes, head.shapes, strict=True):
            assert torch.equal(ours, theirs)
    head.load_state_dict(plain)
    assert head.shapes is None
    layer = PrototypicalRegularizer(DIM, K)
    layer.head.fit(z)
    again = PrototypicalRegularizer(DIM, K)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.head.shapes.factors, layer.head.shapes.factors)
    again.head.reset_parameters()
    assert again.head.shapes is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_have_the_dtype_of_the_prototypes(dtype: torch.dtype) -> None:
    head, z, _ = clusters()
    head.fit(z)
    head.to(dtype)
    assert head.sample(4).dtype == dtype
    assert head.sample(4).isfinite().all()
    head.fit(z.to(dtype))
    assert head.sample(4).dtype == dtype


def test_a_head_of_ones_own_says_whose_a_latent_is() -> None:
    class Last(PrototypeHead):
        def forward(self, z: Tensor) -> Tensor:
            return torch.arange(K).expand(len(z), K).to(z)

    head = Last(DIM, K)
    head.fit(torch.randn(40, DIM))
    assert head.shapes.weights.tolist() == [0, 0, 1]


def test_a_loaded_head_has_memory_of_its_own() -> None:
    head, z, _ = clusters()
    head.fit(z)
    twin = PrototypeHead(DIM, K)
    twin.load_state_dict(head.state_dict())
    assert twin.shapes.factors.data_ptr() != head.shapes.factors.data_ptr()


def test_training_goes_on_with_the_shapes_in_the_head() -> None:
    layer, z = PrototypicalRegularizer(DIM, K), torch.randn(30, DIM)
    layer.head.init_from(z)
    twin = copy.deepcopy(layer)
    layer.head.fit(z)
    found = []
    for each in (layer, twin):
        leaf = z.clone().requires_grad_()
        each(leaf)[0].square().sum().backward()
        found.append([leaf.grad, each.head.prototypes.grad])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def trained(steps: int, layer: PrototypicalRegularizer | None = None) -> PrototypicalRegularizer:
    torch.manual_seed(9)
    layer = layer or PrototypicalRegularizer(DIM, K)
    torch.manual_seed(int(layer.steps))
    for _ in range(steps):
        layer(torch.randn(40, DIM, requires_grad=True))
    return layer


def test_after_training_there_are_shapes() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    assert layer.head.shapes is None
    recent = layer.head.clusters.recent
    trained(5, layer)
    torch.manual_seed(0)
    z = torch.randn(200, DIM)
    torch.testing.assert_close(recent.filled(), z)
    twin = PrototypeHead(DIM, K)
    twin.load_state_dict(layer.head.state_dict())
    twin.clusters.recent.reset_parameters()
    twin.fit(z)
    for ours, fitted in zip(layer.head.shapes, twin.shapes, strict=True):
        torch.testing.assert_close(ours, fitted)
    weights = torch.bincount(layer.head(z).argmax(1), minlength=K) / 200
    torch.testing.assert_close(layer.head.shapes.weights, weights)
    assert layer.head.sample(8, prototype=1).shape == (8, DIM)


def test_the_shapes_follow_the_training() -> None:
    layer = trained(5)
    before = layer.head.shapes
    assert layer.head.shapes is before  # computed once
    trained(1, layer)
    assert not torch.equal(layer.head.shapes.centres, before.centres)
    now = layer.head.shapes
    layer.head.place(0, torch.ones(1, DIM))  # so do latents' prototypes
    assert not torch.equal(layer.head.shapes.weights, now.weights)
    layer.eval()
    after = layer.head.shapes
    layer(torch.randn(40, DIM))
    assert layer.head.shapes is after


def test_the_last_latents_replace_a_fit_when_they_are_as_many() -> None:
    layer = trained(3)
    layer.head.fit(torch.randn(100, DIM))
    fitted = layer.head.shapes
    assert layer.head.clusters.recent.is_empty
    trained(2, layer)
    assert torch.equal(layer.head.shapes.centres, fitted.centres)
    trained(1, layer)
    assert not torch.equal(layer.head.shapes.centres, fitted.centres)


def test_masked_rows_and_maps() -> None:
    layer = PrototypicalRegularizer(DIM, K, layout="b n d")
    z, mask = torch.randn(8, 5, DIM), torch.rand(8, 5) < 0.5
    layer(z.clone().requires_grad_(), mask)
    torch.testing.assert_close(layer.head.clusters.recent.filled(), z[mask])
    recent = layer.head.clusters.recent
    recent.reset_parameters()
    many = torch.arange(1.0, 3 * recent.at_once + 1)[:, None].expand(-1, DIM)
    for _ in range(3):
        recent.push(many, None)
    assert len(recent.filled()) == 3 * recent.at_once  # a third of each batch, another third each time
    assert len(recent.filled()[:, 0].unique()) == 3 * recent.at_once


def test_the_ring_overwrites_the_oldest_and_has_a_bound() -> None:
    recent = PrototypeHead(512, K).clusters.recent
    slots = len(recent.latents)
    assert slots * 512 == 1 << 22
    for i in range(18):
        recent.push(torch.full((recent.at_once, 512), i + 1.0), None)
    assert recent.filled()[:, 0].unique().tolist() == list(range(3, 19))


def test_a_resumed_training_has_the_same_shapes() -> None:
    straight = trained(4, trained(4))
    half = trained(4)
    assert "head.clusters.recent.latents" in half.state_dict()
    resumed = PrototypicalRegularizer(DIM, K)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    trained(4, resumed)
    for ours, theirs in zip(resumed.head.shapes, straight.head.shapes, strict=True):
        assert torch.equal(ours, theirs)
    resumed.half()
    assert resumed.head.clusters.recent.latents.dtype == torch.float32
    with torch.device("meta"):
        bare = PrototypicalRegularizer(DIM, K)
    bare.load_state_dict(straight.state_dict(), assign=True)
    assert torch.equal(bare.head.shapes.centres, straight.head.shapes.centres)


def test_a_round_head_learns_no_shape() -> None:
    for layer in (
        PrototypicalRegularizer.paper(DIM, K),
        PrototypicalRegularizer(DIM, K, head=PrototypeHead(DIM, K, covariance="isotropic")),
    ):
        trained(4, layer)
        assert layer.head.shapes is None
        with pytest.raises(ValueError, match="covariance='low_rank'"):
            layer.head.fit(torch.randn(50, DIM))
        layer.load_state_dict(trained(4).state_dict(), strict=layer.follower.rate > 0)
        assert layer.head.shapes is None
    with pytest.raises(ValueError, match="covariance: expected one of"):
        PrototypeHead(DIM, K, covariance="round")
    with pytest.raises(ValueError, match="rank: expected an int >= 1"):
        PrototypeHead(DIM, K, rank=0)


def test_a_head_that_nobody_has_trained_goes_to_the_clusters() -> None:
    centres = 20 * torch.randn(K, DIM)
    z = (centres[:, None] + torch.randn(K, 300, DIM)).flatten(0, 1)
    head = PrototypeHead(DIM, K, similarity="euclidean")
    torch.manual_seed(1)
    head.fit(z.split(100))
    torch.testing.assert_close(head.shapes.weights, torch.full((K,), 1 / K))
    nearest = torch.cdist(centres, head.prototypes.detach()).amin(1)
    assert nearest.max() < 1
    before = head.prototypes.detach().clone()
    head.fit(z + 1)  # no longer where they were drawn
    assert torch.equal(head.prototypes, before)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"z": torch.zeros(5, DIM + 1)}, ValueError, "z: expected 6 columns"),
        ({"z": torch.zeros(0, DIM)}, ValueError, "z: expected a non-empty"),
        ({"z": torch.full((5, DIM), torch.nan)}, ValueError, "z: expected finite latents"),
        ({"z": [torch.zeros(5, DIM), torch.zeros(5)]}, ValueError, "z: expected shape"),
        ({"z": [[1.0] * DIM]}, TypeError, "z: expected"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict, error: type, words: str) -> None:
    head, _, _ = clusters()
    with pytest.raises(error, match=words):
        head.fit(**arguments)
    assert head.shapes is None
    with pytest.raises(ValueError, match="spread: expected"):
        head.sample(3, spread=-1.0)
    with pytest.raises(ValueError, match="spread: expected"):
        head.mixture(spread=0.0)
