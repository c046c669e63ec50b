"""The Triton kernels without a GPU: in Triton's interpreter, compiled for several GPUs, and registered."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from proto_reg.kernels import backends

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not tested: pip install triton"
)
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def built() -> None:
    """These tests do not wait for the CPU kernels."""


def run(*arguments: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]]), **variables}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=HERE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_against_float64_in_the_interpreter() -> None:
    """Triton decides when it is imported whether it interprets, so this takes another process."""
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py"))
    assert "passed" in run(*command, TRITON_INTERPRET="1", PYTEST_ADDOPTS="")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["80", "90", "120", "gfx942"])
def test_nothing_spills(target: str, tmp_path: Path) -> None:
    """The widest tiles and the most options, compiled for GPUs that are not here."""
    lines = run(str(HERE / "triton_spills.py"), target, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) == 25
    for line in lines:
        kernel, spilled = line.rsplit(maxsplit=1)
        assert spilled == "0", f"{kernel} spills {spilled} bytes on {target}"


def test_kernels_are_registered_until_a_cuda_library_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends._reset()
    assert not backends._registered("proto_reg::sinkhorn", "CUDA")
    assert backends._missing_triton(load=True) == []
    assert all(backends._registered(name, "CUDA") for name in backends.OPERATORS["triton"])
    assert backends.loaded("triton") is not None
    backends._unload_triton()
    assert not any(backends._registered(name, "CUDA") for name in backends.OPERATORS["triton"])
    monkeypatch.setitem(backends._loaded, "cuda", Path("library.so"))
    assert "backend='cuda'" in backends._missing_triton(load=True)[0]
    backends._reset()


def test_auto_takes_it_on_a_gpu_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    backends._reset()
    asked: list[str] = []

    def reasons(name: str, *_: object) -> list[str]:
        asked.append(name)
        return [] if name == "triton" else ["it is not built."]

    monkeypatch.setattr(backends, "reasons", reasons)
    assert backends._resolve("auto", torch.device("cuda"), torch.float32) == "triton"
    assert asked == ["cuda", "triton"]
    backends._reset()


def test_a_tensor_on_the_cpu_and_float64_are_refused() -> None:
    for scores, part in ((torch.zeros(3, 2), "scores.to\\('cuda'\\)"), (torch.zeros(3, 2).double(), "backend='torch'")):
        with pytest.raises(ValueError, match=part):
            backends.choose("triton", scores)
