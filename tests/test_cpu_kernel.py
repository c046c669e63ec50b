"""The compiled CPU kernel itself, with every instruction set, any number of threads, and odd shapes and memory."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import across_instruction_sets, cosines, log_sinkhorn
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_reg.functional import sinkhorn, sinkhorn_cross_entropy, sinkhorn_cross_entropy_and_gradient

pytestmark = pytest.mark.usefixtures("cpu_library")


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 600),
    columns=st.integers(1, 150),
    scale=st.sampled_from([0.1, 1.0, 30.0, 1e4]),
    num_iters=st.integers(1, 12),
    seed=st.integers(0, 999),
    weighted=st.booleans(),
    marginal=st.booleans(),
)
def test_any_shape_against_float64(rows, columns, scale, num_iters, seed, weighted, marginal) -> None:
    torch.manual_seed(seed)
    scores = scale * cosines(rows, columns)
    weights = torch.randint(1, 4, (rows,)) if weighted else torch.ones(rows, dtype=torch.int64)
    marginals = torch.rand(columns).softmax(0) if marginal else None
    repeated = scores.repeat_interleave(weights, 0)
    truth = log_sinkhorn(repeated, 0.05, num_iters, marginals)[weights.cumsum(0) - 1]
    options = {"weights": weights.float() if weighted else None, "marginals": marginals}
    codes = sinkhorn(scores, 0.05, num_iters, backend="cpu", **options)
    assert (codes.double() - truth).abs().max() < 1e-6
    loss = sinkhorn_cross_entropy(scores, 0.05, num_iters, backend="cpu", **options)
    terms = -(truth * (scores.double() / 0.1).log_softmax(1)).sum(1)
    expected = (terms * weights).sum() / weights.sum()
    assert abs(loss - expected) <= 1e-6 * max(1.0, abs(float(expected)), scale)


@settings(max_examples=150, deadline=None)
@given(
    groups=st.integers(1, 40),
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    scale=st.sampled_from([0.1, 1.0, 30.0, 1e4]),
    num_iters=st.sampled_from([1, 2, 5, 40]),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["", "-inf", "-1e9", "weights", "mask", "marginals", "a marginal each", "tol", "potentials"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)
def test_many_small_matrices_against_float64(groups, rows, columns, scale, num_iters, seed, kind, dtype) -> None:
    """A matrix in each lane of a vector: every option, lanes without a matrix, and entries that fill no vector."""
    torch.manual_seed(seed)
    scores = (scale * torch.randn(groups, rows, columns).tanh()).to(dtype)
    options: dict = {}
    if kind in ("-inf", "-1e9"):
        lost = torch.rand(scores.shape) < 0.3
        lost[..., 0] = False
        scores = scores.masked_fill(lost, float(kind))
    if kind == "weights":
        options["weights"] = torch.rand(groups, rows) + 0.01
    if kind == "mask":  # also groups in which no row counts
        options["mask"] = torch.rand(groups, rows) < 0.6
    if "marginal" in kind:
        options["marginals"] = torch.rand((groups, columns) if "each" in kind else columns).softmax(-1)
        options["prototype_mask"] = torch.arange(columns) != 1
    if kind == "tol":
        options["tol"] = 1e-3
    ours = sinkhorn(scores, 0.05, num_iters, backend="cpu", return_potentials=kind == "potentials", **options)
    truth = sinkhorn(scores.double(), 0.05, num_iters, return_potentials=kind == "potentials", **options)
    if kind == "potentials":
        assert torch.allclose(ours[1].double(), truth[1], rtol=1e-6, atol=2e-6)
        ours, truth = ours[0], truth[0]
    step = torch.finfo(dtype).eps if dtype != torch.float32 else 0
    assert (ours.double() - truth).abs().max() < 1e-6 + step


def test_a_bad_matrix_among_small_ones_stays_alone() -> None:
    scores = torch.randn(21, 5, 6)
    expected = sinkhorn(scores, backend="cpu")
    for bad in (math.nan, math.inf):
        spoilt = scores.clone()
        spoilt[9, 2, 3] = bad
        codes = sinkhorn(spoilt, backend="cpu")
        assert codes[9].isnan().all()
        kept = torch.arange(21) != 9
        assert torch.equal(codes[kept], expected[kept])
        isolated = sinkhorn(spoilt, backend="cpu", nan_policy="isolate")
        assert isolated[9].isnan().any(1).tolist() == [False, False, True, False, False]


def with_entries(scores: torch.Tensor, kind: str) -> torch.Tensor:
    """Scores of a wide span, each kind in its own way."""
    scores = scores.clone()
    if kind == "one low":
        scores[3, 2] = -3
    elif kind == "a low row":
        scores[3] = -200
    elif kind == "a low column":
        scores[:, 2] = -200
    elif kind == "causal":
        scores.masked_fill_(torch.ones(scores.shape).triu(1) > 0, -math.inf)
    elif kind == "large negative":
        scores.masked_fill_(torch.rand(scores.shape) < 0.1, -1e9)
        scores[:, 0] = 0.1
    elif kind == "no column":
        scores[:, 2] = -math.inf
    return scores


@pytest.mark.parametrize("kind", ["one low", "a low row", "a low column", "causal", "large negative", "no column"])
@pytest.mark.parametrize("shape", [(40, 5), (300, 5), (256, 10), (100, 50), (64, 200), (300, 300)])
def test_scores_of_any_span_against_float64(shape: tuple[int, int], kind: str) -> None:
    for scale, num_iters in itertools.product((1, 20), (1, 3, 50)):
        scores = with_entries(scale * cosines(*shape), kind)
        truth, expected = sinkhorn(scores.double(), 0.05, num_iters, return_potentials=True)
        codes, potentials = sinkhorn(scores, 0.05, num_iters, backend="cpu", return_potentials=True)
        assert (codes.double() - truth).abs().max() < 1e-6
        assert (codes[scores == -math.inf] == 0).all()
        assert torch.allclose(potentials.double(), expected, rtol=1e-6, atol=2e-6)
        loss, gradient, same = sinkhorn_cross_entropy_and_gradient(scores, 0.05, num_iters, backend="cpu")
        by_truth = sinkhorn_cross_entropy_and_gradient(scores.double(), 0.05, num_iters)
        assert abs(loss - by_truth[0]) <= 1e-6 * max(1.0, abs(by_truth[0]))
        assert (gradient - by_truth[1]).abs().max() * shape[0] * 0.1 < 1e-6
        assert (same.double() - truth).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wide_span_in_half_precision_is_as_in_float32(dtype: torch.dtype) -> None:
    scores = (20 * cosines(4001, 2111)).to(dtype)  # so large that every pass computes the exponentials
    codes = sinkhorn(scores, backend="cpu")
    wide = sinkhorn(scores.float(), backend="cpu")
    assert ((codes.float() - wide).abs() <= torch.finfo(dtype).eps * wide + 2**-24).all()


# The kernel writes this shape past the caches, and its rows have different alignments.
LARGE = (4001, 1051)


@pytest.mark.parametrize("with_codes", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_matrix_larger_than_the_caches_against_float64(weighted: bool, with_codes: bool) -> None:
    torch.manual_seed(0)
    scores = cosines(*LARGE)
    weights = torch.randint(1, 4, LARGE[:1]) if weighted else torch.ones(LARGE[0], dtype=torch.int64)
    truth = log_sinkhorn(scores.repeat_interleave(weights, 0), 0.05, 3)[weights.cumsum(0) - 1]
    log_p = (scores.double() / 0.1).log_softmax(1)
    share = (weights / weights.sum()).unsqueeze(1)
    options = {"weights": weights.float() if weighted else None, "backend": "cpu"}
    around = torch.full((scores.numel() + 64,), 123.0)
    for offset in (0, 5):
        out = around[offset : offset + scores.numel()].view(LARGE)
        assert (sinkhorn(scores, out=out, **options).double() - truth).abs().max() < 1e-6
        assert (around[offset + scores.numel() :] == 123).all()
    leaf = scores.clone().requires_grad_()
    found = sinkhorn_cross_entropy(leaf, return_codes=with_codes, **options)
    loss = found[0] if with_codes else found
    loss.backward()
    assert abs(loss - (-(truth * log_p) * share).sum()) < 1e-6
    assert ((leaf.grad.double() - (log_p.exp() - truth) * share / 0.1) / share * 0.1).abs().max() < 1e-6
    if with_codes:
        assert (found[1].double() - truth).abs().max() < 1e-6


def test_a_large_output_that_no_float_is_aligned_in() -> None:
    rows, columns = 4096, 1024
    memory = bytearray(4 * rows * columns + 1)
    out = torch.frombuffer(memory, dtype=torch.float32, count=rows * columns, offset=1).view(rows, columns)
    scores = cosines(rows, columns)
    assert torch.allclose(sinkhorn(scores, backend="cpu", out=out), sinkhorn(scores, backend="torch"), atol=1e-6)


@pytest.mark.parametrize("num_iters", [1, 3, 9])  # up to 8, every pass computes the exponentials
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_matrix_in_half_precision_is_as_in_float32(dtype: torch.dtype, num_iters: int) -> None:
    scores = cosines(4001, 2111).to(dtype)
    options = {"num_iters": num_iters, "weights": torch.rand(4001), "backend": "cpu"}
    narrow = sinkhorn_cross_entropy_and_gradient(scores, **options)
    wide = sinkhorn_cross_entropy_and_gradient(scores.float(), **options)
    assert narrow[0] == pytest.approx(wide[0].item(), abs=1e-6)
    for ours, theirs in zip(narrow[1:], wide[1:], strict=True):
        assert ours.dtype == dtype
        rounding = torch.finfo(dtype).eps * theirs.abs() + 2**-24  # the step of float16's subnormals
        assert ((ours.float() - theirs).abs() <= rounding + 1e-6 * theirs.abs().max()).all()


@pytest.mark.parametrize("shape", [(256, 30), (1500, 200), (5000, 17), (5001, 5), (64, 5000), LARGE])
@pytest.mark.parametrize("scale", [1, 40])
def test_the_same_bits_for_any_number_of_threads(shape: tuple[int, int], scale: float) -> None:
    scores = scale * cosines(*shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = scores.clone().requires_grad_()
            loss, codes = sinkhorn_cross_entropy(leaf, backend="cpu", return_codes=True)
            loss.backward()
            potentials = sinkhorn(scores, backend="cpu", return_potentials=True)[1]
            results.append((loss.detach(), codes, leaf.grad, potentials))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_is_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    finite = values[values.isfinite()]
    scores = torch.stack([finite, torch.zeros_like(finite)], 1)
    wide = scores.float()
    for num_iters in (1, 3):
        codes = sinkhorn(scores, 1.0, num_iters, backend="cpu")
        assert torch.equal(codes, sinkhorn(wide, 1.0, num_iters, backend="cpu").to(dtype))


def test_nan_and_infinity_in_half_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        scores = cosines(20, 9).to(dtype)
        scores[3, 4] = math.nan
        assert sinkhorn(scores, backend="cpu").isnan().all()
        isolated = sinkhorn(scores, backend="cpu", nan_policy="isolate")
        assert isolated[3].isnan().all()
        assert isolated[:3].isfinite().all()


@pytest.mark.parametrize("columns", [9, 17, 20, 33, 52, 116])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_a_row_of_no_weight_holds_reaches_no_other(columns: int, bad: float) -> None:
    for column, policy, num_iters in itertools.product((0, columns - 1), ("isolate", "propagate"), (1, 3)):
        scores = cosines(40, columns)
        scores[5, column] = bad
        mask = torch.arange(40) != 5
        options = {"num_iters": num_iters, "mask": mask, "nan_policy": policy}
        ours, theirs = (
            sinkhorn_cross_entropy_and_gradient(scores, backend=backend, **options) for backend in ("cpu", "torch")
        )
        for x, y in zip(ours, theirs, strict=True):
            assert torch.allclose(x, y, atol=1e-6, equal_nan=True)
        codes = sinkhorn(scores, backend="cpu", **options)
        assert torch.allclose(codes, theirs[2], atol=1e-6, equal_nan=True)
        assert policy == "propagate" or codes[mask].isfinite().all()


def test_outputs_and_nothing_else_are_written() -> None:
    for rows, columns in ((7, 3), (256, 30), (256, 33), (250, 50), (1000, 65), (33, 1100)):
        scores = cosines(rows, columns)
        around = torch.full((rows * columns + 64,), 123.0)
        out = around[32 : 32 + rows * columns].view(rows, columns)
        before = scores.clone()
        sinkhorn(scores, backend="cpu", out=out)
        assert (around[:32] == 123).all()
        assert (around[-32:] == 123).all()
        assert torch.equal(scores, before)
        assert (out.sum(1) - 1).abs().max() < 1e-5


def test_nothing_is_left_from_the_call_before() -> None:
    torch.use_deterministic_algorithms(True)  # so empty() returns tensors of NaN
    try:
        for rows, columns in ((256, 30), (9, 3), (700, 70), (250, 50), (256, 30)):
            for scale in (1, 50):
                scores = scale * cosines(rows, columns)
                error = (sinkhorn(scores, backend="cpu").double() - log_sinkhorn(scores, 0.05, 3)).abs().max()
                assert error < 1e-6
    finally:
        torch.use_deterministic_algorithms(False)


BY_ISA = """
import sys, torch
from proto_reg.functional import sinkhorn, sinkhorn_cross_entropy
torch.manual_seed(0)
results = []
SHAPES = (1, 1), (5, 3), (256, 10), (256, 30), (250, 50), (100, 64), (300, 65), (700, 7), (2000, 131), (999, 4203)
for rows, columns in SHAPES:
    for scale in (1, 100):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            scores = (scale * torch.randn(rows, columns).tanh()).to(dtype).requires_grad_()
            loss, codes = sinkhorn_cross_entropy(scores, backend="cpu", return_codes=True)
            loss.backward()
            results += [loss.detach(), codes, scores.grad * rows]
torch.save(results, sys.argv[1])
"""


@pytest.mark.slow
def test_instruction_sets_agree(tmp_path: Path) -> None:
    for a, b in across_instruction_sets(BY_ISA, tmp_path):
        step = 10 * torch.finfo(a.dtype).eps if a.dtype != torch.float32 else 0
        assert (a.double() - b.double()).abs().max() <= 1e-5 + step


@pytest.mark.parametrize(
    "shape", [(1, 200, 12), (1, 64, 128), (1, 300, 5), (1, 700, 300), (20, 6, 4), (3, 40, 1)], ids=str
)
@pytest.mark.parametrize("size", [1.0, 20.0])
def test_the_kernel_counts_as_float64_does(shape: tuple[int, int, int], size: float) -> None:
    """Narrow and wide scores, few and many columns, many small matrices, one column, weights and shares."""
    groups, rows, columns = shape
    scores = torch.stack([size * cosines(rows, columns) * 0.8**i for i in range(groups)])
    scores[:, 0, columns // 2 + 1 :] = -torch.inf
    weights, marginals = torch.rand(groups, rows), torch.rand(groups, columns).softmax(1)
    weights[:, 1], weights[-1] = 0, 0.5
    for options in ({}, {"weights": weights}, {"marginals": marginals, "nan_policy": "isolate"}):
        exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        _, expected = sinkhorn(scores.double(), 0.1, 400, tol=1e-2, return_info=True, **exact)
        codes, info = sinkhorn(scores, 0.1, 400, tol=1e-2, return_info=True, backend="cpu", **options)
        assert info.iterations.dtype == torch.int64
        assert (info.iterations - expected.iterations).abs().amax() <= 1  # where float32 is on the other side of tol
        assert torch.equal(codes, sinkhorn(scores, 0.1, 400, tol=1e-2, backend="cpu", **options))
