"""Prototypes, their scores, and the mixture they define."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

from proto_reg import PrototypeHead, PrototypicalRegularizer


def test_scores_by_their_formulas() -> None:
    z = torch.randn(3, 4, 8)
    for scores in ("cosine", "dot", "euclidean"):
        head = PrototypeHead(8, 5, similarity=scores)
        v = head.prototypes
        expected = {
            "cosine": F.cosine_similarity(z[..., None, :], v, dim=-1),
            "dot": z @ v.T,
            "euclidean": -0.5 * (z[..., None, :] - v).square().sum(-1) + 0.5 * z.square().sum(-1, keepdim=True),
        }[scores]
        assert head(z).shape == (3, 4, 5)
        torch.testing.assert_close(head(z), expected, rtol=1e-4, atol=1e-5)


def test_initial_spread() -> None:
    assert isinstance(PrototypeHead(4, 2).prototypes, torch.nn.Parameter)
    assert PrototypeHead(256, 100).prototypes.std().item() == pytest.approx(0.5, rel=0.02)
    assert PrototypeHead(256, 100, init_std=2.0).prototypes.std().item() == pytest.approx(2.0, rel=0.02)


def test_init_from_takes_distinct_latents_and_covers_clusters() -> None:
    centres = 100 * torch.eye(6)
    z = centres.repeat(50, 1) + torch.randn(300, 6)
    head = PrototypeHead(6, 6)
    head.init_from(z, torch.Generator().manual_seed(0))
    assert sorted(head.prototypes.argmax(1).tolist()) == list(range(6))
    assert (torch.cdist(head.prototypes, z).amin(1) == 0).all()
    again = PrototypeHead(6, 6)
    again.init_from(z, torch.Generator().manual_seed(0))
    assert torch.equal(head.prototypes, again.prototypes)


def test_init_from_identical_latents() -> None:
    head = PrototypeHead(3, 4)
    head.init_from(torch.ones(9, 3))
    assert torch.equal(head.prototypes, torch.ones(4, 3))


@pytest.mark.parametrize("std", [1.0, 0.3])
def test_mixture_is_torchs_mixture(std: float) -> None:
    head = PrototypeHead(6, 4).double()
    mixture = head.mixture(std)
    general = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(4, dtype=torch.float64)),
        torch.distributions.Independent(torch.distributions.Normal(head.prototypes, std), 1),
    )
    x = torch.randn(7, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(mixture.log_prob(x), general.log_prob(x))
    torch.testing.assert_close(mixture.mean, general.mean)
    torch.testing.assert_close(mixture.variance, general.variance)
    responsibilities = mixture.responsibilities(x)
    weighted = general.component_distribution.log_prob(x[..., None, :]).softmax(-1)
    torch.testing.assert_close(responsibilities, weighted)
    assert mixture.sample((5, 2)).shape == (5, 2, 6)


def test_mixture_far_from_the_origin_in_float32() -> None:
    head = PrototypeHead(16, 3)
    x = head.sample(20)
    near = head.mixture().log_prob(x)
    with torch.no_grad():
        head.prototypes.copy_((head.prototypes * 512).round() / 512 + 1000)
    exact = head.mixture().log_prob(x + 1000)
    head.double()
    torch.testing.assert_close(exact.double(), head.mixture().log_prob((x + 1000).double()), rtol=1e-5, atol=1e-4)
    assert near.shape == exact.shape


def test_log_prob_has_gradients_at_a_prototype() -> None:
    head = PrototypeHead(4, 3)
    z = head.prototypes.detach().clone().requires_grad_()
    head.mixture().log_prob(z).sum().backward()
    assert z.grad.isfinite().all()


def test_sample() -> None:
    head = PrototypeHead(8, 3, init_std=50.0)
    around = head.sample(4000, 1, std=2.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(around.mean(0), head.prototypes[1].detach(), rtol=0, atol=0.2)
    torch.testing.assert_close(around.std(0), torch.full((8,), 2.0), rtol=0.1, atol=0)
    assert torch.equal(head.sample(2, 2, std=0.0), head.prototypes[2].expand(2, 8))
    anywhere = head.sample(3000)
    nearest = torch.cdist(anywhere, head.prototypes).argmin(1)
    assert (nearest.bincount(minlength=3) > 850).all()
    assert not anywhere.requires_grad
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(head.sample(5, generator=generator), head.sample(5, generator=generator.manual_seed(1)))


def test_bad_arguments() -> None:
    head = PrototypeHead(4, 3)
    with pytest.raises(TypeError, match="prototype: expected an int"):
        head.sample(2, 1.5)
    assert head.sample(2, torch.tensor(1)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"prototype: expected an index in \[0, 3\), got 3"):
        head.sample(2, 3)
    with pytest.raises(ValueError, match="at least 3 latents"):
        head.init_from(torch.randn(2, 4))
    before = head.prototypes.clone()
    with pytest.raises(ValueError, match="finite latents"):
        head.init_from(torch.full((5, 4), torch.nan))
    assert torch.equal(head.prototypes, before)
    with pytest.raises(ValueError, match=r"z: expected shape \(..., 4\), got \(2, 5\)"):
        head(torch.randn(2, 5))
    with pytest.raises(TypeError, match="floating-point"):
        head(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="similarity: expected one of 'cosine'"):
        PrototypeHead(4, 3, similarity="l2")
    with pytest.raises(ValueError, match="std: expected a finite number > 0"):
        head.mixture(0.0)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def parametrized(kind: str, **options) -> PrototypicalRegularizer:
    """A layer whose ``head.prototypes`` are computed from other parameters."""
    layer = PrototypicalRegularizer(8, 4, **options)
    if kind == "weight_norm":
        nn.utils.parametrizations.weight_norm(layer.head, "prototypes")
    elif kind == "own":
        nn.utils.parametrize.register_parametrization(layer.head, "prototypes", Doubled())
    else:
        nn.utils.prune.l1_unstructured(layer.head, "prototypes", amount=0.2)
    return layer


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
@pytest.mark.parametrize("kind", ["weight_norm", "own", "prune"])
def test_prototypes_that_are_computed_are_not_written_to_in_silence(kind: str, mode: str) -> None:
    """A write would only change a temporary tensor."""
    layer, z = parametrized(kind, mode=mode), torch.randn(32, 8, requires_grad=True)
    before = copy.deepcopy(layer.state_dict())
    for act in (
        lambda: layer(z),
        lambda: layer.head.init_from(z.detach()),
        lambda: layer.head.place(slice(0, 1), z[:1].detach()),
        layer.head.reset_parameters,
    ):
        with pytest.raises(RuntimeError, match=r"head\.prototypes: expected a parameter .* follow_rate=0"):
            act()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
@pytest.mark.parametrize("kind", ["weight_norm", "own", "prune"])
def test_prototypes_that_are_computed_learn_without_the_follower(kind: str, mode: str) -> None:
    layer = parametrized(kind, mode=mode, follow_rate=0.0).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        leaf = torch.randn(32, 8, dtype=torch.float64, requires_grad=True)
        probe = layer.losses(leaf)
        names, parameters = zip(*layer.named_parameters(), strict=True)
        (by_z, *expected) = torch.autograd.grad(probe.prototype_loss, [leaf, *parameters])
        out, info = layer(leaf)
        g = torch.randn_like(leaf)
        factor = layer.prototype_weight * (g.norm() / by_z.norm() if mode == "balanced" else 1.0)
        optimizer.zero_grad()
        ((out * g).sum() + (info.loss if mode == "weighted" else 0.0)).backward()
        for name, parameter, gradient in zip(names, parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, factor * gradient, msg=name)
        optimizer.step()
    assert layer.steps == 3
    assert layer.metrics()["prototype_loss"] > 0


def test_frozen_prototypes_may_be_computed() -> None:
    layer = parametrized("weight_norm")
    layer.head.requires_grad_(False)
    layer(torch.randn(32, 8, requires_grad=True))[0].sum().backward()
    assert layer.steps == 1


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_functional_call_with_computed_prototypes(mode: str) -> None:
    """If the given tensor is a leaf, the layer moves it, as torch writes to given buffers.

    A move of a computed tensor would be lost, so the layer raises an error.
    """
    layer, z = PrototypicalRegularizer(8, 4, mode=mode, follow_rate=0.5), torch.randn(32, 8, requires_grad=True)
    given = layer.head.prototypes.detach().clone().requires_grad_()
    for _ in range(3):
        torch.func.functional_call(layer, {"head.prototypes": given}, (z,))
        with torch.no_grad():
            given += 1e-3
    assert not torch.equal(given, layer.head.prototypes + 3e-3)
    with pytest.raises(RuntimeError, match="functional_call"):
        torch.func.functional_call(layer, {"head.prototypes": 1.0 * given}, (z,))


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_a_head_whose_parameters_were_taken_away(rate: float) -> None:
    """FSDP1 does this. It puts a view of its flat parameter in their place."""
    layer, z = PrototypicalRegularizer(8, 4, follow_rate=rate), torch.randn(32, 8, requires_grad=True)
    flat = nn.Parameter(layer.head.prototypes.detach().flatten())
    del layer.head.prototypes
    layer.head.prototypes = flat.view(4, 8)
    with pytest.raises(RuntimeError, match="fully_shard"):
        layer(z)
    layer = PrototypicalRegularizer(8, 4, follow_rate=0.02)
    layer.head.prototypes._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="fully_shard"):
        layer(z)
