"""The number of prototypes, their hierarchy and their nearest examples, on latents with known answers."""

from __future__ import annotations

import pytest
import torch
from scipy.cluster.hierarchy import cut_tree, is_valid_linkage
from scipy.spatial.distance import squareform

from proto_reg import PrototypeHead
from proto_reg.functional import choose_num_prototypes, nearest_examples, prototype_hierarchy
from proto_reg.functional.clusters import _bhattacharyya


def blobs(count: int, dim: int = 8, each: int = 150, apart: float = 12.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of ``count`` normals, and the centres."""
    torch.manual_seed(0)
    centres = apart * torch.eye(dim)[:count]
    return (centres[:, None] + torch.randn(count, each, dim)).flatten(0, 1), centres


def head_at(v: torch.Tensor) -> PrototypeHead:
    head = PrototypeHead(v.shape[1], len(v), similarity="euclidean")
    head.place(slice(None), v)
    return head


def test_separate_normals_are_counted() -> None:
    z, _ = blobs(6)
    counts = choose_num_prototypes(z, (12, 1, 3, 6, 8, 6))
    assert counts.candidates.tolist() == [1, 3, 6, 8, 12]
    assert counts.by_silhouette == counts.by_likelihood == 6
    assert counts.silhouette[0].isnan()
    assert counts.log_likelihood[2] == counts.log_likelihood.max()


def test_the_likelihood_is_that_of_a_fitted_head() -> None:
    """For K = 1 k-means is the mean, so any head has the same fit."""
    z, _ = blobs(1, each=500)
    counts = choose_num_prototypes(z, [1])
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    head = PrototypeHead(8, 1)
    head.fit(z[order[100:]])
    density = head.mixture().log_prob(z[order[:100]])
    # k-means stops at centres that are close to the mean, in float32.
    assert counts.log_likelihood.item() == pytest.approx(density.mean().item(), rel=1e-4)
    assert counts.standard_error.item() == 0  # of the difference from the best


def test_bad_latents_and_candidates() -> None:
    z, _ = blobs(2, each=20)
    with pytest.raises(ValueError, match="candidates: expected at least one, each at most 32"):
        choose_num_prototypes(z, [5, 33])
    with pytest.raises(ValueError, match="candidates: expected at least one"):
        choose_num_prototypes(z, [])
    with pytest.raises(TypeError, match="candidates: expected an int"):
        choose_num_prototypes(z, [2.0])
    with pytest.raises(ValueError, match="latents: expected at least 10 rows, got 9"):
        choose_num_prototypes(z[:9], [2])
    with pytest.raises(ValueError, match="latents: expected finite"):
        choose_num_prototypes(z / 0, [2])


def test_distances_are_those_of_the_dense_formula() -> None:
    z, centres = blobs(3, dim=6, apart=3)
    head = head_at(centres)
    head.fit(z @ torch.randn(6, 6))
    c, factors, diagonals = (part.double() for part in head.shapes[1:])
    S = factors @ factors.mT + torch.diag_embed(diagonals)
    found = _bhattacharyya(c, factors, diagonals)
    for i in range(3):
        for j in range(3):
            mean, gap = (S[i] + S[j]) / 2, c[i] - c[j]
            determinants = torch.logdet(mean) - (torch.logdet(S[i]) + torch.logdet(S[j])) / 2
            expected = gap @ torch.linalg.solve(mean, gap) / 8 + determinants / 2
            torch.testing.assert_close(found[i, j], expected, rtol=1e-9, atol=1e-9)


def test_overlapping_prototypes_merge_first() -> None:
    z, centres = blobs(3)
    near = torch.cat([centres, centres + 0.5 * torch.randn(3, 8)])  # prototypes k and k + 3 share a normal
    head = head_at(near)
    head.fit(z)
    tree = prototype_hierarchy(head)
    assert is_valid_linkage(tree)
    groups = cut_tree(tree, 3)[:, 0].tolist()
    assert groups[:3] == groups[3:]
    assert sorted(set(groups)) == [0, 1, 2]
    assert squareform(_bhattacharyya(*(part.double() for part in head.shapes[1:])).numpy()).min() == tree[0, 2]


def test_a_hierarchy_needs_a_fit() -> None:
    with pytest.raises(ValueError, match=r"Call head\.fit"):
        prototype_hierarchy(PrototypeHead(4, 3))
    head = PrototypeHead(4, 1)
    head.fit(torch.randn(10, 4))
    with pytest.raises(ValueError, match="at least two prototypes"):
        prototype_hierarchy(head)


def test_nearest_examples_are_the_prototypes_own() -> None:
    head = head_at(torch.tensor([[0.0, 0], [10, 0], [0, 50]]))
    z = torch.tensor([[3.0, 0], [9, 0], [1, 0], [2, 1], [6, 0]])
    assert nearest_examples(head, z, 2).tolist() == [[2, 3], [1, 4], [-1, -1]]
    assert nearest_examples(head, z, 4).tolist() == [[2, 3, 0, -1], [1, 4, -1, -1], [-1] * 4]
    with pytest.raises(ValueError, match="n: expected an int >= 1"):
        nearest_examples(head, z, 0)
    with pytest.raises(ValueError, match="latents: expected 2 columns"):
        nearest_examples(head, torch.zeros(3, 5), 1)
