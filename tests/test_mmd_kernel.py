"""The compiled anchored MMD: every instruction set, any number of threads, odd shapes and memory, and bad input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import across_instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proto_reg import AnchoredMMDLoss
from proto_reg.functional import anchored_mmd
from proto_reg.functional.mmd import DEFAULT_SCALES

pytestmark = pytest.mark.usefixtures("cpu_library")


def case(rows: int, groups: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents around anchors. A third of the latents are at one anchor, and about one in ten belongs to no anchor."""
    v = 0.5 * torch.randn(groups, dim)
    assignments = torch.randint(groups, (rows,))
    assignments[: rows // 3] = 0
    z = v[assignments] + 1.2 * torch.randn(rows, dim)
    assignments[torch.rand(rows) < 0.1] = -1
    return z, v, assignments


def value_and_gradient(
    z: Tensor, v: Tensor, assignments: Tensor, mask: Tensor | None = None, std: float = 1.0, **options
) -> tuple[Tensor, Tensor]:
    return AnchoredMMDLoss(**options).value_and_gradient(z, v, assignments, mask, std)


def errors(z: Tensor, v: Tensor, assignments: Tensor, backend: str, **options) -> tuple[float, float]:
    """The errors of the loss and of the gradient against float64. The second is relative to the largest entry."""
    expected, by_z = value_and_gradient(z.double(), v.double(), assignments, **options)
    loss, gradient = value_and_gradient(z, v, assignments, backend=backend, **options)
    assert loss.dtype == gradient.dtype == torch.float32
    size = by_z.abs().max().clamp_min(1e-30)
    return float((loss - expected).abs()), float((gradient - by_z).abs().max() / size)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 400),
    groups=st.integers(1, 60),
    dim=st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 64, 100, 256]),
    scales=st.sampled_from(
        [DEFAULT_SCALES, (1.0,), (0.3, 0.7, 1.9), (4.0, 2.0, 1.0), tuple(0.1 * 1.3**i for i in range(20))]
    ),
    statistic=st.sampled_from(["unbiased", "biased"]),
    reduction=st.sampled_from(["mean", "sum"]),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape_against_float64(rows, groups, dim, scales, statistic, reduction, masked, seed) -> None:
    torch.manual_seed(seed)
    z, v, assignments = case(rows, groups, dim)
    mask = torch.rand(rows) < 0.8 if masked else None
    options = {"scales": scales, "statistic": statistic, "reduction": reduction, "mask": mask}
    loss, gradient = errors(z, v, assignments, "cpu", **options)
    plain_loss, plain_gradient = errors(z, v, assignments, "torch", **options)
    clusters = groups if reduction == "sum" else 1
    assert loss <= max(2e-7 * clusters, 2 * plain_loss)
    # If a cluster is close to normal, attraction and repulsion nearly cancel. Only their rounding errors remain.
    assert gradient <= max(1e-5, 2 * plain_gradient)


@pytest.mark.parametrize(("rows", "groups", "dim"), [(5000, 3, 64), (3000, 1, 17), (4096, 100, 4), (700, 2, 300)])
def test_clusters_of_many_tiles(rows: int, groups: int, dim: int) -> None:
    z, v, assignments = case(rows, groups, dim)
    loss, gradient = errors(z, v, assignments, "cpu")
    assert loss < 2e-7
    assert gradient < 1e-5


def test_few_and_no_members() -> None:
    z, v, _ = case(6, 5, 7)
    for assignments in ([0, 1, 2, 3, 4, -1], [-1] * 6, [7, 5, -3, 99, 2**40, -(2**40)]):
        loss, gradient = value_and_gradient(z, v, torch.tensor(assignments), backend="cpu")
        assert loss == 0
        assert not gradient.any()
    pair = torch.tensor([3, 0, -1, 3, 1, 2])
    gradient = value_and_gradient(z, v, pair, backend="cpu")[1]
    assert (gradient.abs().sum(1) > 0).tolist() == [True, False, False, True, False, False]


def test_on_the_whole_as_exact_as_plain_torch() -> None:
    ours, plain = [], []
    for rows in range(20, 300, 7):
        arguments = case(rows, 8, 1 + rows % 97)
        ours.append(errors(*arguments, "cpu"))
        plain.append(errors(*arguments, "torch"))
    for mine, theirs in zip(torch.tensor(ours).mean(0), torch.tensor(plain).mean(0), strict=True):
        assert mine <= 1.1 * theirs


def test_far_from_the_anchors_and_from_the_origin() -> None:
    z, v, assignments = case(300, 5, 64)
    z, v = (z * 512).round() / 512, (v * 512).round() / 512  # exact after the shift
    assert errors(z + 1000, v + 1000, assignments, "cpu")[0] < 1e-6
    far = errors(z + 30, v, assignments, "cpu")
    plain = errors(z + 30, v, assignments, "torch")
    assert far[0] <= max(2e-7, 2 * plain[0])
    assert far[1] <= max(3e-6, 2 * plain[1])
    lost = value_and_gradient(z * 1e4, v, assignments, backend="cpu")[1]  # every exponential is 0
    assert not lost.any()


def test_coinciding_latents_have_a_finite_gradient() -> None:
    z = torch.ones(40, 33)
    assert max(errors(z, torch.zeros(1, 33), torch.zeros(40, dtype=torch.int64), "cpu")) < 3e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dim", [3, 64])
def test_nan_stays_in_its_cluster(dim: int, bad: float) -> None:
    z, v, assignments = case(300, 4, dim)  # too many for one matrix in plain torch
    z[150, 1], assignments[150] = bad, 2
    results = [value_and_gradient(z, v, assignments, backend=name) for name in ("cpu", "torch")]
    for loss, gradient in results:
        assert loss.isnan()
        assert torch.equal(gradient.isnan().any(1), assignments == 2)
    finite = assignments != 2
    torch.testing.assert_close(results[0][1][finite], results[1][1][finite], rtol=1e-4, atol=1e-7)
    mask = torch.arange(300) != 150
    assert anchored_mmd(z, v, assignments, mask=mask, backend="cpu").isfinite()


def test_non_contiguous_inputs() -> None:
    z, v, assignments = case(60, 4, 20)
    mask = torch.rand(60) < 0.7
    expected = value_and_gradient(z, v, assignments, mask=mask, backend="cpu")
    strided = value_and_gradient(
        z.T.contiguous().T,
        torch.cat([v, v], 1)[:, :20],
        assignments.repeat_interleave(2)[::2],
        mask=mask.repeat_interleave(3)[::3],
        backend="cpu",
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, strided, strict=True))


@pytest.mark.parametrize(("rows", "groups", "dim"), [(256, 30, 256), (5000, 7, 64), (2048, 30, 4), (65, 1, 300)])
def test_the_same_bits_for_any_number_of_threads_and_memory(rows: int, groups: int, dim: int) -> None:
    z, v, assignments = case(rows, groups, dim)
    before = torch.get_num_threads()
    results = []
    torch.use_deterministic_algorithms(True)  # so empty() returns tensors of NaN
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            value_and_gradient(9 * z, v, assignments, backend="cpu")  # leaves other numbers in memory
            results.append(value_and_gradient(z, v, assignments, backend="cpu"))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert results[0][1].isfinite().all()


def test_gradients_of_latents_and_anchors() -> None:
    z, v, assignments = case(80, 6, 10)
    mask = torch.rand(80) < 0.8
    found = []
    for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (z, v)]
        (3 * anchored_mmd(*leaves, assignments, mask=mask, backend=backend)).backward()
        found.append([leaf.grad.double() for leaf in leaves])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    z, v, assignments = case(30, 4, 5)
    mask = torch.rand(30) < 0.8
    operator = torch.ops.proto_reg.anchored_mmd_loss.default
    for leaf in (z, v):
        leaf.requires_grad_(grad)
    torch.library.opcheck(operator, (z, v, assignments, mask, [0.5, 1.0], True, True))
    torch.library.opcheck(operator, (z, v, assignments, None, [1.0], False, False))


def test_compile_in_one_graph() -> None:
    z, v, assignments = case(60, 4, 8)
    z.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(z: Tensor) -> Tensor:
        return anchored_mmd(z, v, assignments, backend="cpu")

    expected = anchored_mmd(z, v, assignments, backend="cpu")
    assert torch.equal(loss(z), expected)
    assert torch.equal(*(torch.autograd.grad(value, z)[0] for value in (loss(z), expected)))


def test_a_backend_that_cannot_is_refused_with_the_cure() -> None:
    z, v, assignments = case(20, 3, 4)
    for options in ({"kernel": "energy"}, {"target": "sampled"}):
        with pytest.raises(ValueError, match=r"backend: .*got 'cpu'.*Use 'auto'"):
            anchored_mmd(z, v, assignments, backend="cpu", **options)
        anchored_mmd(z, v, assignments, **options)
    with pytest.raises(ValueError, match="Use 'auto'"):
        anchored_mmd(z.double(), v, assignments, backend="cpu")
    with pytest.raises(ValueError, match="Use 'auto'"):
        anchored_mmd(z, v, torch.rand(20, 3), backend="cpu")
    with pytest.raises(ValueError, match=r"backend: expected one of 'auto', 'torch', 'cpu'"):
        AnchoredMMDLoss(backend="cuda")
    plain = AnchoredMMDLoss(backend="torch")(z, v, assignments)
    assert torch.equal(plain, anchored_mmd(z, v, assignments, backend="torch"))


BY_ISA = """
import sys, torch
sys.path.insert(0, "tests")
from test_mmd_kernel import value_and_gradient
torch.manual_seed(0)
results = []
for rows, groups, dim in ((5, 1, 1), (64, 5, 3), (256, 30, 256), (300, 2, 17), (900, 3, 70)):
    z, v, assignments = torch.randn(rows, dim), torch.randn(groups, dim), torch.randint(groups, (rows,))
    results += value_and_gradient(z, v, assignments, backend="cpu")
torch.save(results, sys.argv[1])
"""


@pytest.mark.slow
def test_instruction_sets_agree(tmp_path: Path) -> None:
    for a, b in across_instruction_sets(BY_ISA, tmp_path):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6 * float(b.abs().max()) + 2e-7)
