"""Which backend computes a call, and which error comes when a chosen backend cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from proto_reg import __main__ as command_line
from proto_reg.kernels import backends, build

SCORES = torch.zeros(3, 2)


@pytest.fixture(autouse=True)
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, no library in the package, no environment variables, and no memory of earlier choices."""
    monkeypatch.setenv("PROTO_REG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "lib")
    for name in ("PROTO_REG_BACKEND", "PROTO_REG_BUILD"):
        monkeypatch.delenv(name, raising=False)
    backends._reset()
    yield tmp_path / "cache"
    backends._reset()


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A CPU library that seems to exist and to load. The fixture is the list of all loads."""
    done: list[Path] = []
    monkeypatch.setattr(build, "candidates", lambda backend, *_: [(tmp_path / f"{backend}.so", None)])

    def load(path: Path) -> None:
        time.sleep(0.05)
        done.append(path)

    monkeypatch.setattr(torch.ops, "load_library", load)
    monkeypatch.setattr(backends, "_registered", lambda name, key: key == "CPU")
    return done


def test_auto_falls_back_to_torch_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("auto", SCORES) == "torch"


def test_auto_takes_the_library_for_what_it_computes(loads: list[Path]) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert backends.choose("auto", SCORES.to(dtype)) == "cpu"
    assert backends.choose("auto", SCORES.double()) == "torch"
    assert backends.choose("auto", SCORES.to("meta")) == "torch"
    assert backends.choose("torch", SCORES) == "torch"
    assert len(loads) == 1
    assert backends.loaded("cpu") == loads[0]


def test_argument_over_environment_over_auto(loads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.choose("auto", SCORES) == "cpu"
    monkeypatch.setenv("PROTO_REG_BACKEND", "torch")
    backends._reset()
    assert backends.choose("auto", SCORES) == "torch"
    assert backends.choose("cpu", SCORES) == "cpu"
    monkeypatch.setenv("PROTO_REG_BACKEND", "cpu")
    backends._reset()
    assert backends.choose("auto", SCORES) == "cpu"
    with pytest.raises(ValueError, match=r"PROTO_REG_BACKEND: .* float64 scores on cpu, got 'cpu'"):
        backends.choose("auto", SCORES.double())
    monkeypatch.setenv("PROTO_REG_BACKEND", "fast")
    backends._reset()
    with pytest.raises(ValueError, match="PROTO_REG_BACKEND: expected one of 'auto', 'torch', 'cpu', 'cuda'"):
        backends.choose("auto", SCORES)
    with pytest.raises(ValueError, match="backend: expected one of"):
        backends.choose("fast", SCORES)


def test_a_forced_backend_raises_with_every_reason(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "obstacle", lambda backend: "no compiler. Install one.")
    with pytest.raises(
        ValueError, match="backend: expected a backend that can compute float64 scores on cpu"
    ) as caught:
        backends.choose("cuda", SCORES.double())
    for reason in ("scores.to('cuda')", "backend='torch'", str(nothing_built), "Install one", "'auto'"):
        assert reason in str(caught.value)
    with pytest.raises(RuntimeError) as missing:
        backends.choose("cpu", SCORES)
    for reason in (str(nothing_built), str(build.PREBUILT), "cannot be built here: no compiler"):
        assert reason in str(missing.value)
    monkeypatch.setattr(build, "obstacle", lambda backend: None)
    with pytest.raises(RuntimeError, match=r"python -m proto_reg build cpu"):
        backends.choose("cpu", SCORES)


def test_choosing_and_explaining_agree(loads: list[Path]) -> None:
    for backend in backends.NAMES[1:]:
        for scores in (SCORES, SCORES.double(), SCORES.half(), SCORES.to("meta")):
            if backends.reasons(backend, scores.device, scores.dtype):
                with pytest.raises((ValueError, RuntimeError)):
                    backends.choose(backend, scores)
            else:
                assert backends.choose(backend, scores) == backend


def test_a_library_that_does_not_load_is_tried_once(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_built.mkdir()
    stem = nothing_built / f"cpu-any-torch2.11-{build._identity('cpu')}-recipe"
    file = nothing_built / "content"
    file.write_bytes(b"no library" * 1000)
    path = file.rename(f"{stem}-{build._digest(file)}.so")
    assert build.find("cpu") == path
    assert backends.choose("auto", SCORES) == "torch"
    with pytest.raises(RuntimeError, match=r"does not load: .*invalid ELF header"):
        backends.choose("cpu", SCORES)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("tried again"))
    assert backends.choose("auto", SCORES.half()) == "torch"


def test_a_library_without_the_operators_is_refused(loads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", lambda name, key: name != "proto_reg::sinkhorn_out")
    assert backends.choose("auto", SCORES) == "torch"
    with pytest.raises(RuntimeError, match=r"registers no proto_reg::sinkhorn_out\."):
        backends.choose("cpu", SCORES)


def test_a_library_is_refused_under_a_torch_without_the_stable_abi(nothing_built: Path, monkeypatch) -> None:
    nothing_built.mkdir()
    (nothing_built / f"cpu-any-torch2.11-{build._identity('cpu')}-recipe-digest.so").touch()
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    assert backends.choose("auto", SCORES) == "torch"
    with pytest.raises(RuntimeError, match=r"need torch 2\.11 or later, this is 2\.10\.1\. Upgrade it\."):
        backends.choose("cpu", SCORES)


def test_a_library_that_comes_later_is_found_by_a_forced_choice_and_then_by_auto(request, monkeypatch) -> None:
    assert backends.choose("auto", SCORES) == "torch"
    request.getfixturevalue("loads")
    assert backends.choose("auto", SCORES) == "torch"
    assert backends.choose("cpu", SCORES) == "cpu"
    assert backends.choose("auto", SCORES) == "cpu"


def test_built_at_first_use_only_when_the_environment_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: list[str] = []

    def fake_build(backend: str) -> Path:
        built.append(backend)
        return tmp_path / f"{backend}.so"

    monkeypatch.setattr(build, "build", fake_build)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(backends, "_registered", lambda name, key: True)
    monkeypatch.setenv("PROTO_REG_BUILD", "cuda")
    assert backends.choose("auto", SCORES) == "torch"
    monkeypatch.setenv("PROTO_REG_BUILD", "all")
    backends._reset()
    assert backends.choose("auto", SCORES) == "cpu"
    assert built == ["cpu"]


def test_a_build_that_was_asked_for_and_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(backend: str) -> Path:
        raise build.BuildError("no compiler")

    monkeypatch.setattr(build, "build", fails)
    monkeypatch.setenv("PROTO_REG_BUILD", "cpu")
    with pytest.warns(UserWarning, match="PROTO_REG_BUILD: no compiler"):
        assert backends.choose("auto", SCORES) == "torch"


def test_threads_load_once(loads: list[Path]) -> None:
    barrier = threading.Barrier(8)
    names: list[str] = []

    def work() -> None:
        barrier.wait()
        names.append(backends.choose("auto", SCORES))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["cpu"] * 8
    assert len(loads) == 1


def test_a_choice_made_is_looked_up(loads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    backends.choose("auto", SCORES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", None)
        patch.setattr(backends, "_decide", None)
        assert backends.choose("auto", SCORES) == "cpu"


def branch(scores: Tensor) -> Tensor:
    return scores * 2 if backends.choose("auto", scores) == "cpu" else scores * 3


def test_compiles_and_exports_without_a_break(loads: list[Path]) -> None:
    class Layer(torch.nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return branch(scores)

    ones = torch.ones(3, 2)
    compiled = torch.compile(branch, fullgraph=True, backend="eager")
    assert compiled(ones).unique().tolist() == [2]
    assert compiled(ones.double()).unique().tolist() == [3]
    for strict in (True, False):
        exported = torch.export.export(Layer(), (ones,), strict=strict)
        assert exported.module()(ones).unique().tolist() == [2]


def test_a_fake_cuda_tensor_asks_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with FakeTensorMode():
        assert backends.choose("auto", torch.empty(3, 2, device="cuda")) == "torch"


def test_a_gpu_that_the_library_does_not_run_on_is_found_out(loads: list[Path], monkeypatch) -> None:
    def refuses(*_, **__) -> Tensor:
        raise RuntimeError("no kernel image is available")

    for name, value in (("is_available", True), ("is_current_stream_capturing", False), ("get_device_name", "old GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    monkeypatch.setattr(backends, "_registered", lambda name, key: key == "CUDA")
    monkeypatch.setattr(torch, "zeros", refuses)
    assert backends._resolve("auto", torch.device("cuda"), torch.float32) == "torch"
    with pytest.raises(RuntimeError, match="does not run on old GPU: no kernel image"):
        backends._resolve("cuda", torch.device("cuda"), torch.float32)


def test_a_choice_made_inside_a_graph_capture_is_not_kept(loads: list[Path], monkeypatch) -> None:
    for name in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(backends, "_registered", lambda name, key: key == "CUDA")
    assert backends._resolve("auto", torch.device("cuda"), torch.float32) == "cuda"
    assert not backends._chosen
    trials: list[str] = []
    monkeypatch.setattr(backends, "_capturing", lambda: False)
    monkeypatch.setattr(backends, "_trial", lambda *arguments: trials.append("once") or ["it does not run."])
    assert backends._resolve("auto", torch.device("cuda"), torch.float32) == "torch"
    assert trials == ["once"]


def test_import_compiles_nothing_and_probes_nothing(nothing_built: Path) -> None:
    code = """
import subprocess, sys, torch
def refuse(*_, **__): raise AssertionError("at import")
before = set(sys.modules)
subprocess.Popen = torch._C._cuda_getDeviceCount = torch.cuda.is_available = refuse
import pathlib
pathlib.Path.glob = pathlib.Path.read_bytes = pathlib.Path.mkdir = refuse
import proto_reg
from proto_reg.kernels import backends
assert not {"torch.utils.cpp_extension", "torch._dynamo"} & (set(sys.modules) - before)
assert not torch.ops.loaded_libraries, torch.ops.loaded_libraries
"""
    environment = {**os.environ, "PROTO_REG_BUILD": "all", "PROTO_REG_BACKEND": "nonsense"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)
    assert not nothing_built.exists()


def test_a_tensor_on_the_cpu_asks_no_gpu(loads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_available", "device_count", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("asked"))
    assert backends.choose("auto", SCORES) == "cpu"
    with pytest.raises(ValueError, match="the scores are on cpu"):
        backends.choose("cuda", SCORES)
    assert [path.name for path in loads] == ["cpu.so"]  # a backend that cannot compute is not loaded


def test_report(capsys: pytest.CaptureFixture[str], nothing_built: Path) -> None:
    assert command_line.main(["backends"]) == 0
    text = capsys.readouterr().out
    for expected in (f"torch {torch.__version__}", str(nothing_built), "torch: runs everywhere", "cpu: does not run"):
        assert expected in text
    assert ("no GPU in sight" in text) != torch.cuda.is_available()


def test_command_line_builds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def only_cpu(backend: str, *, say: Callable[[str], None]) -> Path:
        if backend == "cuda":
            raise build.BuildError("no nvcc")
        return Path("the/library.so")

    monkeypatch.setattr(build, "build", only_cpu)
    assert command_line.main(["build", "cpu"]) == 0
    assert "cpu: the/library.so" in capsys.readouterr().out.replace(os.sep, "/")
    assert command_line.main(["build", "all"]) == 1
    assert "cuda: no nvcc" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(["build", "tpu"])
    capsys.readouterr()


def test_the_library_itself(cpu_library: Path, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    # The test has its own cache. The user's cache may hold the library of another environment.
    cpu_library = Path(shutil.copy(cpu_library, tmp_path))
    monkeypatch.setenv("PROTO_REG_CACHE", str(tmp_path))
    assert backends.choose("auto", SCORES) == "cpu"
    assert backends.loaded("cpu") == cpu_library
    assert not backends.reasons("cpu", SCORES.device, SCORES.dtype)
    command_line.main(["backends"])
    assert f"cpu: runs from {cpu_library}" in capsys.readouterr().out
