"""The builder, with a real compiler. The sources are small and compile in a moment."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from proto_reg.kernels import build

ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
SCRIPT = """
import sys
from pathlib import Path
from proto_reg.kernels import build
build.CSRC = Path(sys.argv[1])
build.SOURCES = {"cpu": ("cpu_ops.cpp",)}
print(build.build("cpu"))
"""
needs_compiler = pytest.mark.skipif(build.obstacle("cpu") is not None, reason=str(build.obstacle("cpu")))


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small sources, and an empty cache."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "cpu_ops.cpp").write_text(ANSWER)
    monkeypatch.setattr(build, "CSRC", folder)
    monkeypatch.setattr(build, "SOURCES", {"cpu": ("cpu_ops.cpp",), "cuda": ("cpu_ops.cpp", "answer_cuda.cu")})
    monkeypatch.setenv("PROTO_REG_CACHE", str(tmp_path / "cache"))
    for name in ("CXX", "CUDA_HOME", "PROTO_REG_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the trial in another process. It takes longer than the compilation of the small sources."""
    monkeypatch.setattr(build, "_try_to_load", lambda library: None)


def compiler(path: Path, *, sleep: float = 0.0) -> Path:
    """A compiler that writes its process id to ``path``.log when it compiles, and then waits ``sleep`` seconds."""
    real = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))))
    path.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        if [ "$1" != --version ]; then echo $$ >> {path}.log; sleep {sleep}; fi
        exec {real} "$@"
        """)
    )
    path.chmod(0o755)
    return path


def start(csrc: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(csrc)]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> list[int]:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)
    return [int(line) for line in path.read_text().split()]


def running(group: int) -> list[str]:
    """The states of the processes of a group, without dead ones that their parent has not waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
            found += [state] if int(of) == group and state not in "ZX" else []
    return found


@needs_compiler
def test_the_library_is_built_once_found_and_works(csrc: Path, tmp_path: Path) -> None:
    assert build.find("cpu") is None
    path = build.build("cpu")
    assert path.parent == tmp_path / "cache"
    assert ctypes.CDLL(str(path)).answer() == 42
    modified = path.stat().st_mtime_ns
    assert build.build("cpu") == path == build.find("cpu")
    assert path.stat().st_mtime_ns == modified
    elsewhere = build.build("cpu", directory=tmp_path / "elsewhere")
    assert elsewhere.parent == tmp_path / "elsewhere"
    assert not list(path.parent.glob("tmp-*"))


@needs_compiler
def test_processes_that_start_together_compile_once(csrc: Path, tmp_path: Path) -> None:
    slow = compiler(tmp_path / "compiler", sleep=0.5)
    builders = [start(csrc, CXX=str(slow)) for _ in range(2)]
    paths = {builder.communicate(timeout=120)[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len(wait_for(Path(f"{slow}.log"))) == 1
    (path,) = paths
    assert ctypes.CDLL(path).answer() == 42


@needs_compiler
def test_a_killed_builder_leaves_nothing_that_blocks_the_next(csrc: Path, tmp_path: Path, untried: None) -> None:
    slow = compiler(tmp_path / "compiler", sleep=60)
    with start(csrc, CXX=str(slow)) as builder:
        (orphan,) = wait_for(Path(f"{slow}.log"))
        builder.kill()
    begin = time.monotonic()
    try:
        path = build.build("cpu")
    finally:
        os.killpg(orphan, signal.SIGKILL)
    assert time.monotonic() - begin < 20
    assert ctypes.CDLL(str(path)).answer() == 42


@needs_compiler
def test_what_killed_builders_leave_is_removed_in_time(csrc: Path, tmp_path: Path, untried: None) -> None:
    old, young = (tmp_path / "cache" / f"tmp-cpu-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    build.build("cpu")
    assert not old.exists()
    assert young.exists()


@needs_compiler
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + b"?", lambda _: b""])
def test_a_damaged_library_is_never_loaded_and_built_anew(csrc: Path, untried: None, damage) -> None:
    path = build.build("cpu")
    data = path.read_bytes()
    path.unlink()
    path.with_name(f"{path.stem.rpartition('-')[0]}-{'0' * 16}.so").write_bytes(damage(data))
    ((_, objection),) = build.candidates("cpu")
    assert objection is not None
    assert "damaged" in objection
    assert build.find("cpu") is None
    assert ctypes.CDLL(str(build.build("cpu"))).answer() == 42
    assert len(build.candidates("cpu")) == 1


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(csrc: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROTO_REG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(build.BuildError, match="PROTO_REG_CACHE"):
        build.build("cpu")
    assert build.find("cpu") is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not let the test do this")
def test_what_is_missing_is_named_with_its_cure(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(shutil, "which", lambda *_: None)
        assert "g++" in str(build.obstacle("cpu"))
        without.setenv("CXX", "no-such-compiler")
        assert "CXX='no-such-compiler'" in str(build.obstacle("cpu"))
        with pytest.raises(build.BuildError, match="no-such-compiler"):
            build.build("cpu")
    (csrc / "answer_cuda.cu").touch()
    monkeypatch.setattr(build, "_nvcc", lambda: None)
    monkeypatch.setattr(build, "_host_compiler", lambda: "c++")
    assert "CUDA_HOME" in str(build.obstacle("cuda"))
    (csrc / "cpu_ops.cpp").unlink()
    assert "cpu_ops.cpp missing" in str(build.obstacle("cpu"))
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    (csrc / "cpu_ops.cpp").touch()
    assert "torch 2.11 or later" in str(build.obstacle("cpu"))
    with pytest.raises(ValueError, match=r"expected one of 'cpu', 'cuda', got 'tpu'"):
        build.obstacle("tpu")


@needs_compiler
def test_it_says_what_it_does(csrc: Path, untried: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PROGRESS", 0.05)
    said: list[str] = []
    path = build.build("cpu", say=said.append)
    assert said[0] == "compiling ..."
    assert re.fullmatch(r"compiling \.\.\. \d+ s", said[1])
    assert re.fullmatch(r"compiled in \d+ s", said[-1])
    said.clear()
    assert build.build("cpu", say=said.append) == path
    assert said == ["already built"]
    lock = build.cache_directory() / "cpu.lock"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        monkeypatch.setattr(build, "TIMEOUT", 0.2)
        with pytest.raises(build.BuildError):
            build.build("cpu", say=said.append)
    assert said[1:] == ["waiting for another build"]


@needs_compiler
def test_an_error_of_the_compiler_is_shown(csrc: Path) -> None:
    (csrc / "cpu_ops.cpp").write_text("#error the reason\n")
    with pytest.raises(build.BuildError, match=r"error.*the reason") as caught:
        build.build("cpu")
    assert "-O3" in str(caught.value)


@needs_compiler
def test_a_symbol_that_exists_nowhere_shows_when_linked(csrc: Path, untried: None) -> None:
    (csrc / "cpu_ops.cpp").write_text("int nowhere(); int answer() { return nowhere(); }\n")
    with pytest.raises(build.BuildError, match="nowhere"):
        build.build("cpu")


@needs_compiler
def test_a_library_that_ends_the_process_is_not_kept(csrc: Path, tmp_path: Path) -> None:
    """A registration does this if it throws while the library is loaded."""
    (csrc / "cpu_ops.cpp").write_text(
        '#include <stdexcept>\nstruct Init { Init() { throw std::runtime_error("refused"); } } init;\n'
    )
    with pytest.raises(build.BuildError, match="refused"):
        build.build("cpu")
    assert not list((tmp_path / "cache").glob("*.so"))


@needs_compiler
def test_a_compiler_that_never_ends_is_ended(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = compiler(tmp_path / "compiler", sleep=60)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(build, "TIMEOUT", 1.0)
    begin = time.monotonic()
    with pytest.raises(build.BuildError, match="stopped after 1 s"):
        build.build("cpu")
    assert time.monotonic() - begin < 30
    (group,) = wait_for(Path(f"{slow}.log"))
    assert not running(group)


@needs_compiler
def test_waiting_for_another_builder_ends(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(build, "TIMEOUT", 0.5)
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / "cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(build.BuildError, match=r"cpu\.lock"):
            build.build("cpu")


@needs_compiler
def test_another_clone_environment_and_place_of_the_compiler_reuse_the_library(
    csrc: Path, tmp_path: Path, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (csrc / "cpu_ops.cpp").open("a") as file:
        file.write("const char* where() { return __FILE__; }\n")
    first = build.build("cpu")
    modified = first.stat().st_mtime_ns
    clone = shutil.copytree(csrc, tmp_path / "clone" / "csrc")
    environment = tmp_path / "environment" / "torch"
    environment.mkdir(parents=True)
    for name in ("include", "lib"):
        (environment / name).symlink_to(Path(torch.__file__).parent / name)
    monkeypatch.setattr(build, "CSRC", clone)
    monkeypatch.setattr(cpp_extension, "include_paths", lambda: [str(environment / "include")])
    monkeypatch.setattr(cpp_extension, "library_paths", lambda: [str(environment / "lib")])
    link = tmp_path / "bin" / "compiler"
    link.parent.mkdir()
    link.write_text(f'#!/bin/sh\nexec {build._host_compiler()} "$@"\n')
    link.chmod(0o755)
    monkeypatch.setenv("CXX", str(link))
    assert build.build("cpu") == first
    assert first.stat().st_mtime_ns == modified
    monkeypatch.setenv("PROTO_REG_CACHE", str(tmp_path / "other cache"))
    assert build.build("cpu").name == first.name  # the compiled content holds no path either


@needs_compiler
def test_sources_flags_and_compiler_are_the_key(csrc: Path, untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.build("cpu")
    (csrc / "note_cuda.h").write_text("")  # of another backend
    (csrc / "note.txt").write_text("")  # not shipped
    assert build.build("cpu") == first
    monkeypatch.setattr(build, "FLAGS", ("-std=c++17", "-O1"))
    other_flags = build.build("cpu")
    assert other_flags != first
    assert build.find("cpu") in (first, other_flags)
    monkeypatch.setattr(build, "_version", lambda compiler: "another")
    assert build.build("cpu") not in (first, other_flags)
    (csrc / "new.h").write_text("")
    assert build.find("cpu") is None
    assert all("other sources" in str(objection) for _, objection in build.candidates("cpu"))


@needs_compiler
def test_one_library_serves_every_torch_from_the_lowest_on(csrc: Path, untried: None, monkeypatch) -> None:
    path = build.build("cpu")
    for version in ("2.11.0", "2.12.1+cu126", "2.99.0a0+git1234", "3.0.0"):
        monkeypatch.setattr(torch, "__version__", version)
        assert build.build("cpu") == path == build.find("cpu"), version
    monkeypatch.setattr(torch, "__version__", "2.10.2")
    ((_, objection),) = build.candidates("cpu")
    assert objection == "compiled kernels need torch 2.11 or later, this is 2.10.2. Upgrade it."


def test_the_library_asks_torch_for_its_stable_abi_alone(cpu_library: Path) -> None:
    """It takes only the functions of torch's C shims from torch. It uses no C++ name of torch."""
    if shutil.which("nm") is None:
        pytest.skip("nm, of binutils")
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", str(cpu_library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    wanted = [line.split(maxsplit=1)[1] for line in lines]
    assert [name for name in wanted if re.search(r"\b(at|c10|torch|caffe2)::", name)] == []
    assert any(name.startswith("aoti_torch_") for name in wanted)


def test_the_package_comes_before_the_cache(csrc: Path, tmp_path: Path, untried: None, monkeypatch) -> None:
    prebuilt = tmp_path / "lib"
    monkeypatch.setattr(build, "PREBUILT", prebuilt)
    if build.obstacle("cpu"):
        pytest.skip(str(build.obstacle("cpu")))
    inside = build.build("cpu", directory=prebuilt)
    cached = build.build("cpu")
    assert [path for path, _ in build.candidates("cpu")] == [inside, cached]
    assert build.find("cpu") == inside


@pytest.mark.parametrize(
    ("variable", "archs"),
    [("80;90", ["80", "90"]), ("9.0+PTX", ["90ptx"]), ("90a, 120", ["120", "90a"]), ("90 90", ["90"])],
)
def test_architectures_from_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str, archs: list[str]) -> None:
    monkeypatch.setenv("PROTO_REG_CUDA_ARCHS", variable)
    assert build._architectures("nvcc") == archs


def test_architectures_of_the_machine_else_of_the_gpus_people_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTO_REG_CUDA_ARCHS", "hopper")
    with pytest.raises(build.BuildError, match="PROTO_REG_CUDA_ARCHS"):
        build._architectures("nvcc")
    monkeypatch.delenv("PROTO_REG_CUDA_ARCHS")
    monkeypatch.setattr(build, "_output", lambda *_: "sm_75\nsm_80\nsm_86\nsm_90\nsm_100\nsm_120\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    everywhere = ["75", "80", "90ptx", "120ptx"]
    assert build._architectures("nvcc") == everywhere
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)):
        assert build._serves(everywhere, capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 6), (9, 0)][index])
    assert build._architectures("nvcc") == ["86", "90"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 1))  # newer than this nvcc
    assert build._architectures("nvcc") == everywhere


@pytest.mark.parametrize(
    ("archs", "capability", "serves"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("80ptx", (9, 0), True),
        ("90a", (9, 0), True),
        ("90a", (12, 0), False),
        ("80.120", (12, 1), True),
    ],
)
def test_which_gpus_a_library_serves(archs: str, capability: tuple[int, int], serves: bool) -> None:
    assert build._serves(archs.split("."), capability) is serves


def test_cuda_compiles_without_a_gpu(csrc: Path, untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (csrc / "answer_cuda.cu").write_text("__global__ void kernel(float* x) { *x = 1; }\n")
    monkeypatch.setenv("PROTO_REG_CUDA_ARCHS", "80")
    if reason := build.obstacle("cuda"):
        pytest.skip(reason)
    path = build.build("cuda")
    assert path.name.startswith("cuda-80-torch")
    assert ctypes.CDLL(str(path)).answer() == 42
    assert build.find("cuda", (8, 6)) == path
    assert build.find("cuda", (9, 0)) is None


def test_no_source_includes_another_backends() -> None:
    """A change to the CUDA sources does not make the CPU library stale. The builder tells files apart by name."""
    files = [path for path in build.CSRC.iterdir() if path.suffix in build.SUFFIXES]
    assert files
    for path in files:
        for included in re.findall(r'#include "([^"]+)"', path.read_text()):
            for backend in build.BACKENDS:
                assert backend not in included or backend in path.name, f"{path.name} includes {included}"
