"""The diagnostics on latents with known answers."""

from __future__ import annotations

import math

import pytest
import torch

from proto_reg import PrototypeHead
from proto_reg.functional import latent_metrics


def head_at(v: torch.Tensor, scores: str = "euclidean") -> PrototypeHead:
    head = PrototypeHead(v.shape[1], len(v), similarity=scores)
    head.prototypes.data.copy_(v)
    return head


def test_the_distribution_aimed_at() -> None:
    v = 20 * torch.eye(32)[:6]
    head = head_at(v)
    labels = torch.arange(6).repeat(500)
    z = v[labels] + torch.randn(3000, 32)
    metrics = latent_metrics(z, head, labels)
    assert metrics["perplexity"] == pytest.approx(6, rel=1e-3)
    assert metrics["dead"] == metrics["duplicates"] == 0
    assert metrics["separation"] == pytest.approx(20 * math.sqrt(2), rel=1e-5)
    assert metrics["r2_per_dim"] == pytest.approx(1, rel=0.02)
    assert metrics["effective_rank"] == pytest.approx(32, rel=0.02)
    assert metrics["standardised_mmd"].abs().max() < 5
    assert metrics["purity"] == metrics["nmi"] == metrics["acc"] == 1
    assert metrics["usage"].tolist() == pytest.approx([1 / 6] * 6)


def test_what_goes_wrong_shows() -> None:
    v = torch.tensor([[10.0, 0, 0], [10.5, 0, 0], [0, 30.0, 0], [0, 0, 40.0]])
    z = torch.tensor([[0.0, 30, 0]]).repeat(50, 1)  # all latents are on prototype 2
    metrics = latent_metrics(z, head_at(v))
    assert metrics["perplexity"] == pytest.approx(1)
    assert metrics["dead"] == 3
    assert metrics["duplicates"] == 2
    assert metrics["separation"] == pytest.approx(0.5)
    assert metrics["r2_per_dim"] == 0
    assert metrics["effective_rank"] == pytest.approx(1)
    assert metrics["standardised_mmd"][2] > 20
    assert metrics["standardised_mmd"][[0, 1, 3]].isnan().all()
    assert "purity" not in metrics


def test_agreement_on_a_small_table() -> None:
    v = 10 * torch.eye(3)
    found = torch.tensor([0, 0, 0, 1, 1, 2])
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    metrics = latent_metrics(v[found], head_at(v), labels)
    assert metrics["purity"] == pytest.approx(5 / 6)
    assert metrics["acc"] == pytest.approx(4 / 6)


def test_one_prototype() -> None:
    metrics = latent_metrics(torch.randn(100, 4), head_at(torch.zeros(1, 4)))
    assert metrics["separation"] == math.inf
    assert metrics["perplexity"] == pytest.approx(1)


def test_bad_arguments() -> None:
    head = head_at(torch.eye(3))
    with pytest.raises(ValueError, match=r"labels: expected shape \(5,\)"):
        latent_metrics(torch.randn(5, 3), head, torch.zeros(4))
    with pytest.raises(TypeError, match=r"labels: expected a torch\.Tensor"):
        latent_metrics(torch.randn(5, 3), head, [0] * 5)
    with pytest.raises(ValueError, match="z: expected 3 columns"):
        latent_metrics(torch.randn(5, 2), head)
