"""The CUDA kernels on a GPU: the emulation's tests without changes, tests that need a GPU, and timings.

``pytest tests/gpu -s`` runs and prints everything. These commands find races and wrong accesses:
``compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest tests/gpu -k "not timings and not billion"`` and
``compute-sanitizer --tool racecheck --error-exitcode 1 python -m pytest tests/gpu -k "ragged or iterations or tol"``.
"""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sinkhorn_race as race
import torch
import torch._dynamo
from emulation.emulator import SOURCES, load, solve
from test_cuda_source import (  # noqa: F401
    TOLERANCE,
    test_a_column_that_gets_nothing_saves_no_row,
    test_a_single_prototype,
    test_groups,
    test_iterations,
    test_many_iterations_over_a_wide_range,
    test_marginals,
    test_more_rows_than_one_round_of_blocks_takes,
    test_nan_policies,
    test_no_row_counts,
    test_one_row,
    test_ragged_shapes,
    test_robustness_columns,
    test_rows_over_a_cluster_of_a_narrow_range,
    test_rows_shared_by_a_cluster,
    test_the_largest_finite_scores,
    test_the_order_of_threads_does_not_matter,
    test_tol,
    test_tol_of_many_columns,
    test_tol_where_a_column_has_no_mass,
    test_weights,
)
from torch import Tensor

from proto_reg import _bench, functional
from proto_reg.kernels import backends, build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False")

# A shape for each regime of a large GPU, with and without whole quads.
SHAPES = [(256, 10), (256, 30), (256, 50), (1024, 100), (4096, 300), (2048, 3000), (8192, 3000), (4099, 1003)]
SHAPES += [(1024, 65536), (3, 65536), (1, 1), (200_000, 30)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for compiled libraries: PROTO_REG_CACHE, so that several runs compile once, or else a new folder."""
    chosen = os.environ.get("PROTO_REG_CACHE")
    return Path(chosen).absolute() if chosen else tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module", autouse=True)
def cuda_library(cache: Path) -> Iterator[Path]:
    """The library for the GPUs of this machine. After its build, every search finds it."""
    if reason := build.obstacle("cuda"):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTO_REG_CACHE", str(cache))
        backends._reset()
        yield build.build("cuda")
    backends._reset()


@pytest.fixture(scope="module")
def forced(cache: Path) -> ctypes.CDLL:
    source = Path(__file__).with_name("forced.cu")
    target = cache / f"forced-{build._hash(build._identity('cuda'), source.read_bytes())}.so"
    if not target.exists():
        major, minor = torch.cuda.get_device_capability()
        flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", f"-arch=sm_{major}{minor}", f"-I{SOURCES}"]
        own = target.with_suffix(f".{os.getpid()}")
        subprocess.run([str(build._nvcc()), *flags, str(source), "-o", str(own)], check=True)
        own.replace(target)
    return load(target, "cuda")


@pytest.fixture
def library(forced: ctypes.CDLL, request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The fixture that the emulation's tests use."""
    parameters = getattr(request.node, "callspec", None)
    clusters = "cluster" in request.node.name or (parameters and parameters.params.get("way") == "cluster")
    if clusters and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    return forced


def on_gpu(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return _bench.cosine_scores(*shape, device="cuda").to(dtype)


def codes_of(scores: Tensor, **options) -> Tensor:
    return functional.sinkhorn(scores, 0.05, 3, backend="cuda", **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_regimes_that_the_gpu_grants(forced, shape: tuple[int, int], dtype: torch.dtype) -> None:
    scores = on_gpu(shape, dtype)
    expected = _bench.reference(scores)
    error = (codes_of(scores).double() - expected).abs().max().item()
    plan = solve(forced, scores.cpu(), allow=None).plan if scores.numel() <= 1 << 22 else None
    print(f"{shape} {dtype}: {plan.name if plan else ''} error {error:.1e}")
    assert error <= TOLERANCE[dtype]
    loss = functional.sinkhorn_cross_entropy(scores, 0.05, 3, temperature=0.1, backend="cuda")
    p = (scores.double() / 0.1).log_softmax(1)
    torch.testing.assert_close(loss.double(), -(expected * p).sum(1).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:8])
def test_results_repeat_bit_by_bit(shape: tuple[int, int]) -> None:
    scores = on_gpu(shape)
    first = codes_of(scores)
    assert all(torch.equal(codes_of(scores), first) for _ in range(20))


@pytest.mark.parametrize("shape", SHAPES[:8])
def test_graph_capture(shape: tuple[int, int]) -> None:
    scores = on_gpu(shape)
    expected = codes_of(scores)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = codes_of(scores)
    for shift in (0.0, 3.0):
        scores += shift
        codes.fill_(math.nan)
        graph.replay()
        torch.testing.assert_close(codes, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:8])
def test_side_stream(shape: tuple[int, int]) -> None:
    scores = on_gpu(shape)
    expected = codes_of(scores)
    held = torch.full_like(scores, math.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel that does not wait for the stream computes NaN
        held.copy_(scores)
        codes = codes_of(held)
    stream.synchronize()
    assert torch.equal(codes, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device() -> None:
    scores = on_gpu((256, 30))
    assert torch.equal(codes_of(scores.to("cuda:1")).to(scores.device), codes_of(scores))
    assert torch.cuda.current_device() == 0


def test_more_than_two_billion_scores() -> None:
    rows, columns = 33_000, 65_536
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * columns:
        pytest.skip("needs 22 GB")
    scores = torch.rand(rows, columns, device="cuda", dtype=torch.bfloat16)
    codes = codes_of(scores)
    for part in codes.split(1000):
        torch.testing.assert_close(part.float().sum(1), torch.ones(len(part), device="cuda"), rtol=0, atol=5e-3)
    column = sum(part.float().sum(0) for part in codes.split(1000))
    assert (column * columns / rows - 1).abs().max() < 0.05


def microseconds(call: Callable[[Tensor], object], inputs: list[Tensor]) -> tuple[float, float]:
    """The time of one call from Python, and of its kernels alone, as medians over rounds.

    A CUDA graph replays the kernels alone.
    """
    for scores in inputs[:2]:
        call(scores)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for scores in inputs:
            call(scores)

    def eager() -> None:
        for scores in inputs:
            call(scores)

    return tuple(_median(run) / len(inputs) for run in (eager, graph.replay))  # type: ignore[return-value]


def _median(run: Callable[[], object], rounds: int = 15) -> float:
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 10), (256, 30), (256, 50), (1024, 100), *SHAPES[4:7], (1024, 65536)])
def test_timings(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Time the kernels, a copy of the matrix, and SwAV's algorithm, eager and compiled.

    The calls take their inputs in turn. Together, the inputs are larger than the L2 cache.
    """
    torch._dynamo.reset()  # torch compiles at most eight shapes without this
    scores = on_gpu(shape, dtype)
    size = scores.numel() * scores.element_size()
    ring = max(2, min(64, math.ceil(2 * torch.cuda.get_device_properties(0).L2_cache_size / size)))
    inputs = [scores.clone() for _ in range(ring)]
    out = torch.empty_like(scores)
    contenders = {
        "copy": out.copy_,
        "sinkhorn": codes_of,
        "sinkhorn, out=": lambda s: codes_of(s, out=out),
        "sinkhorn, plain torch": lambda s: functional.sinkhorn(s, 0.05, 3, backend="torch"),
        "sinkhorn + cross-entropy": lambda s: functional.sinkhorn_cross_entropy(
            s, 0.05, 3, temperature=0.1, backend="cuda"
        ),
        "SwAV": race.swav,
        "SwAV, compiled": torch.compile(race.swav, dynamic=False),
    }
    print(f"\n{shape} {dtype} on {torch.cuda.get_device_name()}, torch {torch.__version__}: us a call, us of kernels")
    times = {name: microseconds(call, inputs) for name, call in contenders.items()}
    for name, (call, kernels) in times.items():
        print(f"  {name:28}{call:10.1f}{kernels:10.1f}")
    assert times["sinkhorn"][1] < times["SwAV"][1]
