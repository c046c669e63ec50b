"""The CUDA source on the CPU. It builds ``driver.cpp`` and solves problems with the library's planner and launcher."""

from __future__ import annotations

import ctypes
import hashlib
import math
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "proto_reg" / "csrc"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
REGIMES = ("registers", "block", "cluster", "grid", "streamed")
GUARD = 64  # number of floats behind the workspace; no kernel may write them

int64 = ctypes.c_int64


class Problem(ctypes.Structure):
    """``proto_reg::SinkhornProblem``."""

    _fields_ = (
        ("scores", ctypes.c_void_p),
        ("marginals", ctypes.c_void_p),
        ("marginals_stride", int64),
        ("weights", ctypes.c_void_p),
        ("groups", int64),
        ("rows", int64),
        ("columns", int64),
        ("dtype", ctypes.c_int32),
        ("epsilon", ctypes.c_double),
        ("num_iters", int64),
        ("tol", ctypes.c_double),
        ("isolate", ctypes.c_bool),
        ("codes", ctypes.c_void_p),
        ("potentials", ctypes.c_void_p),
        ("temperature", ctypes.c_double),
        ("loss", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("iterations", ctypes.c_void_p),
    )


class Limits(ctypes.Structure):
    """``proto_reg::DeviceLimits``."""

    _fields_ = (
        ("multiprocessors", int64),
        ("threads_per_block", int64),
        ("shared_per_block", int64),
        ("shared_per_multiprocessor", int64),
        ("capability", int64),
        ("cooperative", ctypes.c_bool),
        ("clusters", ctypes.c_bool),
        ("grid_clusters", int64),
    )


class Plan(ctypes.Structure):
    """``proto_reg::SinkhornPlan``."""

    _fields_ = (
        ("regime", ctypes.c_int32),
        ("stride", int64),
        ("threads", int64),
        ("blocks", int64),
        ("cluster", int64),
        ("rows_per_block", int64),
        ("segments", int64),
        ("shared_bytes", int64),
        ("workspace_floats", int64),
        ("lanes", int64),
        ("rows_per_thread", int64),
        ("columns_per_thread", int64),
        ("fused", ctypes.c_bool),
        ("local_columns", int64),
        ("slabs", int64),
        ("sweep_rows", int64),
        ("sweep_segments", int64),
        ("sweep_blocks", int64),
        ("sweep_threads", int64),
        ("narrow_blocks", int64),
        ("narrow_threads", int64),
        ("narrow_cluster", int64),
        ("narrow_lanes", int64),
        ("narrow_quads", int64),
        ("narrow_rows", int64),
        ("narrow_own", int64),
    )

    @property
    def name(self) -> str:
        """registers, block, cluster or grid. If it streams: narrow, fused (one kernel a pass) or sweeps (two)."""
        name = REGIMES[self.regime]
        if name == "streamed":
            return "narrow" if self.narrow_blocks else "fused" if self.fused else "sweeps"
        return name


def device(multiprocessors=4, threads=64, shared=48, clusters=True, cooperative=True) -> Limits:
    """A small device: few multiprocessors with ``shared`` KB of shared memory each, and blocks of few threads."""
    size = shared * 1024
    capability = 90 if clusters else 80
    return Limits(
        multiprocessors, threads, size, 2 * size + 4096, capability, cooperative, clusters, multiprocessors // 2
    )


@dataclass
class Result:
    """The results of a launch."""

    codes: Tensor
    potentials: Tensor
    loss: Tensor
    gradient: Tensor
    plan: Plan = field(repr=False)


def emulation_command(sources: Path = SOURCES) -> list[str]:
    """The command that builds the driver with g++. The output file is not part of it."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("g++")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror"]
    return [compiler, *flags, "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{sources}", str(HERE / "driver.cpp")]


def emulation_key(sources: Path = SOURCES) -> str:
    """A hash of everything that decides the compiler's output: the sources, the command and the compiler's version."""
    command = emulation_command(sources)
    version = subprocess.run([command[0], "--version"], check=True, capture_output=True).stdout
    files = sorted(path for folder in (HERE, sources) for path in folder.iterdir() if path.is_file())
    digest = hashlib.sha256("\0".join(command).encode() + version)
    for path in files:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def compile_emulation(directory: Path, sources: Path = SOURCES) -> ctypes.CDLL:
    """Build the driver in ``directory``, if it is not there yet, and load it."""
    target, half = directory / "emulation.so", directory / "half.so"
    if not target.exists():
        subprocess.run([*emulation_command(sources), "-o", str(half)], check=True, capture_output=True, text=True)
        half.replace(target)
    return load(target, "cpu")


def load(path: Path, device_type: str) -> ctypes.CDLL:
    """Load a library with the functions of ``driver.cpp`` that computes on this type of device."""
    library = ctypes.CDLL(str(path))
    for function in (library.forced_plan, library.forced_launch, library.chosen_launch):
        function.restype = ctypes.c_char_p
    library.device_type = device_type
    return library


def solve(
    library: ctypes.CDLL,
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    num_iters: int = 3,
    marginals: Tensor | None = None,
    weights: Tensor | None = None,
    tol: float | None = None,
    isolate: bool = False,
    temperature: float | None = None,
    with_codes: bool = True,
    limits: Limits | None = None,
    allow: int | None = 0,
    fuse: int = 2,
    order: int = 0,
) -> Result:
    """Make one launch on the library's device. Arguments and results are on the CPU.

    ``allow`` is the first regime that the planner may take. With None, the launcher chooses as for a user. ``order`` is
    the order of the emulated threads. A GPU has its own order.
    """
    place = library.device_type
    batch = (scores if scores.dim() == 3 else scores[None]).contiguous().to(place)
    groups, rows, columns = batch.shape
    codes, gradient = torch.full_like(batch, math.nan), torch.full_like(batch, math.nan)
    potentials = torch.full((groups, columns), math.nan, device=place)
    loss = torch.full((groups,), math.nan, device=place)
    marginals = None if marginals is None else marginals.float().contiguous().to(place)
    weights = None if weights is None else weights.float().contiguous().to(place)
    wants_loss = temperature is not None
    problem = Problem(
        scores=batch.data_ptr(),
        marginals=None if marginals is None else marginals.data_ptr(),
        marginals_stride=0 if marginals is None or marginals.dim() == 1 else columns,
        weights=None if weights is None else weights.data_ptr(),
        groups=groups,
        rows=rows,
        columns=columns,
        dtype=DTYPES[scores.dtype],
        epsilon=epsilon,
        num_iters=num_iters,
        tol=-1.0 if tol is None else tol,
        isolate=isolate,
        codes=codes.data_ptr() if with_codes else None,
        potentials=potentials.data_ptr(),
        temperature=temperature if wants_loss else 0.0,
        loss=loss.data_ptr() if wants_loss else None,
        gradient=gradient.data_ptr() if wants_loss else None,
    )
    plan = Plan()
    limits = device() if limits is None else limits
    queue = int64(torch.cuda.current_stream().cuda_stream if place == "cuda" else order)
    where = ctypes.byref(problem), ctypes.byref(limits)
    if allow is None:
        _check(library.chosen_launch(*where, ctypes.byref(plan), queue))
    else:
        _check(library.forced_plan(*where, allow, fuse, ctypes.byref(plan)))
        workspace = torch.full((plan.workspace_floats + GUARD,), math.nan, device=place)
        memory = ctypes.c_void_p(workspace.data_ptr())
        _check(library.forced_launch(ctypes.byref(problem), ctypes.byref(plan), memory, queue))
        assert workspace[plan.workspace_floats :].isnan().all(), "a write past the end of the workspace"
    codes, gradient = codes.view(scores.shape).cpu(), gradient.view(scores.shape).cpu()
    return Result(codes, potentials.squeeze(0).cpu(), loss.cpu(), gradient, plan)


def _check(error: bytes | None) -> None:
    if error:
        raise RuntimeError(error.decode())
