"""The CUDA library without a GPU: the compiler's report on its kernels, and how it loads and registers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from proto_reg.kernels import build

pytestmark = pytest.mark.slow

# The registers that the planner's blocks leave for each thread, by kernel. A block has 65,536 in all.
REGISTERS = {
    "sinkhorn_registers": 128,
    "sinkhorn_resident": 96,
    "stream_pass": 80,
    "stream_narrow": 128,
    "stream_total": 64,
    "stream_tolerance": 64,
    "stream_finish": 64,
}

LOADED = """
import sys, torch, proto_reg
from torch._subclasses.fake_tensor import FakeTensorMode
torch.ops.load_library(sys.argv[1])
for name in ("sinkhorn", "sinkhorn_codes", "sinkhorn_out", "sinkhorn_cross_entropy"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"proto_reg::{name}", "CUDA"), name
with FakeTensorMode():
    scores = torch.empty(8, 3, device="cuda")
    codes, potentials = torch.ops.proto_reg.sinkhorn(scores, None, None, 0.05, 3, None, False)
    assert codes.device.type == potentials.device.type == "cuda" and codes.shape == (8, 3)
codes, _ = torch.ops.proto_reg.sinkhorn(torch.zeros(8, 3), None, None, 0.05, 3, None, False)
assert codes.sum() == 8  # the other devices' kernels are what they were
print("loaded")
"""


@pytest.fixture(scope="session")
def built() -> None:
    """These tests do not wait for the CPU kernels. Another worker may compile them at the same time."""


@pytest.fixture(scope="session")
def compiled(kept: Callable[[str, str], Path]) -> tuple[Path, str]:
    """The CUDA library and ptxas's report on it. The builder's own command builds it for all its architectures.

    The library has no PTX. For PTX, nvcc compiles the newest architecture once more, and ptxas does not report on it.
    """
    if reason := build.obstacle("cuda"):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        architectures = build._architectures(build._nvcc())
        patch.setenv("PROTO_REG_CUDA_ARCHS", ";".join(name.removesuffix("ptx") for name in architectures))
        command, _ = build._command("cuda")
    folder = kept("cuda", build._recipe("cuda", command))
    target, report = folder / "library.so", folder / "report.txt"
    if not report.exists():
        run = subprocess.run([*command, "-Xptxas=-v", "-o", str(target)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        report.write_text(run.stderr)  # comes last, so a report exists only with a complete library
    return target, report.read_text()


def test_nothing_spills_and_blocks_get_their_registers(compiled: tuple[Path, str]) -> None:
    pattern = r"entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) reg"
    kernels = re.findall(pattern, compiled[1], re.DOTALL)
    assert {architecture for _, architecture, *_ in kernels} >= {"sm_80", "sm_90"}
    for name, architecture, stack, spills, registers in kernels:
        limit = next((most for kernel, most in REGISTERS.items() if kernel in name), 128)
        assert stack == spills == "0", f"{name} spills on {architecture}"
        assert int(registers) <= limit, f"{name} on {architecture}"
    assert all(any(kernel in name for name, *_ in kernels) for kernel in REGISTERS)
    assert "warning" not in compiled[1]


def test_the_library_loads_and_registers_without_a_gpu(compiled: tuple[Path, str]) -> None:
    run = subprocess.run([sys.executable, "-c", LOADED, str(compiled[0])], capture_output=True, text=True)
    assert run.stdout == "loaded\n", run.stderr
