"""The planner of the CUDA kernels: the regime for a shape, and numbers that fit the device."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable

import pytest
from emulation.emulator import SOURCES, Limits, Plan, Problem

H100 = Limits(132, 1024, 227 * 1024, 228 * 1024, 90, True, True, 14)
A100 = Limits(108, 1024, 163 * 1024, 164 * 1024, 80, True, False, 0)
RTX5090 = Limits(170, 1024, 99 * 1024, 100 * 1024, 120, True, True, 20)
DEVICES = {"H100": H100, "A100": A100, "RTX 5090": RTX5090}
SHAPES = [(256, 10), (256, 30), (256, 50), (1024, 100), (4096, 300), (2048, 3000), (8192, 3000), (1024, 65536)]
SHAPES += [(1, 1), (1, 65536), (3, 65536), (65536, 1), (1_000_000, 30), (100_000, 1003), (7, 40_000), (129, 4097)]
REGIMES = ("registers", "block", "cluster", "grid", "streamed")
# The rows and columns for each thread. A kernel is compiled for each of these pairs.
KERNELS = {(r, c) for r in (1, 2, 4) for c in range(2, 13, 2) if r * c <= 20}
SHIM = """
#include "sinkhorn_cuda_plan.h"
using namespace proto_reg;
extern "C" void plan(const SinkhornProblem* p, const DeviceLimits* d, int allow, SinkhornPlan* out) {
  *out = plan_sinkhorn(*p, *d, static_cast<Regime>(allow));
}
extern "C" int64_t sizes(int which) { return which ? sizeof(SinkhornProblem) : sizeof(SinkhornPlan); }
"""

Planner = Callable[..., Plan]


@pytest.fixture(scope="session")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("the planner's shim needs a C++ compiler")
    directory = tmp_path_factory.mktemp("plan")
    (directory / "shim.cpp").write_text(SHIM)
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    command = [compiler, *flags, str(directory / "shim.cpp"), "-o", str(directory / "shim.so")]
    subprocess.run(command, check=True, capture_output=True)
    library = ctypes.CDLL(str(directory / "shim.so"))
    assert library.sizes(1) == ctypes.sizeof(Problem)
    assert library.sizes(0) == ctypes.sizeof(Plan)

    def plan(shape: tuple[int, int], limits: Limits, groups: int = 1, allow: int = 0) -> Plan:
        problem = Problem(groups=groups, rows=shape[0], columns=shape[1], epsilon=0.05, num_iters=3, tol=-1.0)
        result = Plan()
        library.plan(ctypes.byref(problem), ctypes.byref(limits), allow, ctypes.byref(result))
        return result

    return plan


@pytest.mark.parametrize(
    ("shape", "h100", "a100"),
    [
        ((1, 1), "registers", "registers"),
        ((256, 10), "registers", "registers"),
        ((256, 30), "registers", "registers"),
        ((256, 50), "registers", "block"),
        ((1024, 100), "registers", "grid"),
        ((2048, 128), "registers", "grid"),
        ((4096, 300), "grid", "grid"),
        ((2048, 3000), "grid", "narrow"),
        ((8192, 3000), "narrow", "narrow"),
        ((1024, 65536), "narrow", "sweeps"),
        ((3, 65536), "narrow", "sweeps"),
        ((1_000_000, 30), "narrow", "narrow"),
    ],
)
def test_regimes(planner: Planner, shape: tuple[int, int], h100: str, a100: str) -> None:
    assert planner(shape, H100).name == h100
    assert planner(shape, A100).name == a100


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("allow", range(5))
def test_the_numbers_fit(planner: Planner, shape: tuple[int, int], device: str, allow: int) -> None:
    limits = DEVICES[device]
    plan = planner(shape, limits, allow=allow)
    rows, columns = shape
    assert REGIMES.index(plan.name if plan.regime < 4 else "streamed") >= allow
    assert plan.stride % 4 == 0 and 0 <= plan.stride - columns < 4
    assert plan.shared_bytes <= limits.shared_per_block
    for threads in (plan.threads, plan.sweep_threads):
        assert threads % 32 == 0 and threads <= limits.threads_per_block
    assert plan.threads >= 32 and plan.segments >= 1
    assert plan.cluster == 1 or limits.clusters
    assert plan.cluster in (1, 2, 4, 8) and plan.blocks % plan.cluster == 0
    if plan.name in ("block", "cluster", "grid"):
        assert plan.rows_per_block * plan.blocks >= rows
        assert plan.shared_bytes >= 4 * plan.rows_per_block * plan.stride
        assert plan.threads <= 640
    if plan.name == "grid":
        assert plan.blocks <= limits.multiprocessors
        assert plan.rows_per_block * (plan.blocks - 1) < rows
        assert plan.workspace_floats >= plan.blocks * 2 * plan.stride
    if plan.name == "registers":
        check_registers(plan, shape)
    if plan.regime == 4:
        check_streamed(plan, shape, limits)


def check_registers(plan: Plan, shape: tuple[int, int]) -> None:
    rows, columns = shape
    per_warp = 32 // plan.lanes * plan.rows_per_thread
    assert plan.rows_per_block * plan.blocks >= rows
    assert plan.threads // 32 * per_warp >= plan.rows_per_block
    assert plan.lanes * plan.columns_per_thread >= columns
    assert (plan.rows_per_thread, plan.columns_per_thread) in KERNELS and plan.threads <= 512
    assert plan.shared_bytes >= 4 * (2 * plan.threads // 32 + 8) * plan.lanes * plan.columns_per_thread
    if plan.blocks > plan.cluster:
        assert plan.workspace_floats >= 4 * plan.blocks // plan.cluster * plan.lanes * plan.columns_per_thread


def check_streamed(plan: Plan, shape: tuple[int, int], limits: Limits) -> None:
    rows, columns = shape
    assert plan.sweep_blocks >= 1 and plan.sweep_rows >= 1
    assert plan.sweep_blocks * plan.sweep_rows >= min(rows, 8 * limits.multiprocessors * plan.sweep_rows)
    assert 4 * (8 * plan.sweep_rows + 4 + max(4 * plan.sweep_threads, 2 * plan.sweep_rows * plan.sweep_segments)) <= (
        48 * 1024
    )
    assert 1 <= plan.slabs <= 65535
    assert plan.workspace_floats >= 4 * plan.stride + 3 * rows + 2 * plan.slabs * plan.stride + plan.sweep_blocks
    if plan.narrow_blocks:
        assert plan.narrow_cluster in (1, 2, 4, 8) and (plan.narrow_cluster == 1 or limits.clusters)
        assert plan.narrow_blocks % plan.narrow_cluster == 0
        assert (
            plan.narrow_quads * plan.narrow_cluster >= plan.stride // 4 > plan.narrow_quads * (plan.narrow_cluster - 1)
        )
        assert plan.narrow_lanes * plan.narrow_own >= plan.narrow_quads
        assert plan.narrow_threads % 32 == 0 and plan.narrow_threads <= 512
        assert plan.narrow_lanes == plan.narrow_threads or plan.narrow_lanes in (1, 2, 4, 8, 16, 32)
        assert (plan.narrow_rows, plan.narrow_own) in ((4, 1), (2, 2), (2, 4))
        assert plan.workspace_floats >= plan.narrow_blocks // plan.narrow_cluster * plan.stride
    if plan.fused:
        assert plan.local_columns * plan.cluster >= columns > plan.local_columns * (plan.cluster - 1)
        assert plan.local_columns % 4 == 0
        assert plan.shared_bytes >= 4 * plan.local_columns * (plan.rows_per_block + 1)
        assert 2 * (plan.shared_bytes + 1024) <= limits.shared_per_multiprocessor
        assert plan.threads <= 384
        assert plan.workspace_floats >= plan.blocks // plan.cluster * plan.stride


def test_small_problems_take_the_blocks_that_leave_each_thread_few_rows(planner: Planner) -> None:
    """The numbers of blocks, of blocks in a cluster and of rows for each thread, as measured on an H200."""
    for shape, expected in (
        ((256, 10), (1, 1, 1)),
        ((256, 30), (4, 4, 1)),
        ((256, 50), (8, 8, 1)),
        ((512, 30), (8, 8, 1)),
        ((1024, 100), (64, 8, 1)),
        ((2048, 128), (64, 8, 2)),
        ((8192, 64), (64, 8, 4)),
    ):
        plan = planner(shape, H100)
        assert (plan.blocks, plan.cluster, plan.rows_per_thread) == expected, shape


def test_groups_that_fill_the_device_take_few_blocks_each(planner: Planner) -> None:
    assert planner((1024, 50), H100, groups=1).blocks > 8
    assert planner((256, 30), H100, groups=100).blocks == 1
    assert planner((800, 40), H100, groups=100).blocks == 4
    assert planner((800, 40), A100, groups=100).name == "block"
    assert planner((4096, 300), H100, groups=100).name == "grid"


def test_what_a_device_lacks_is_not_asked_for(planner: Planner) -> None:
    lacking = Limits(132, 1024, 227 * 1024, 228 * 1024, 90, False, False, 0)
    for shape in SHAPES:
        plan = planner(shape, lacking)
        assert plan.name in ("registers", "block", "narrow", "fused", "sweeps")
        assert plan.cluster == 1 and plan.narrow_cluster <= 1
