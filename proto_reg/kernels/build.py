"""Compiles the libraries of ``proto_reg/csrc``: on request only, once per machine and compiler.

A library's file name says what it is. So we find one without asking a compiler, and one rename publishes it whole:

    <backend>-<architectures>-torch<lowest version>-<identity>-<recipe>-<digest>.so

*identity* hashes the sources and the platform: it has to agree before we load a library. *recipe* also hashes the
compiler's version and flags: where it agrees we do not compile again. *digest* is the hash of the file itself: we never
load a damaged file. None of them depends on where the sources, torch or the compiler lie, so every clone and every
virtual environment of a machine shares one library.

The sources use torch's stable ABI, so one library serves every torch from the lowest version on. ``setup.py`` runs this
file on its own, hence no relative imports.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Say = Callable[[str], None]
BACKENDS = ("cpu", "cuda")
CSRC = Path(__file__).resolve().parents[1] / "csrc"
PREBUILT = Path(__file__).resolve().parent / "lib"  # filled by PROTO_REG_BUILD=... pip install
SOURCES = {
    "cpu": (
        *("cpu_ops.cpp", "cpu_kernels.cpp", "mmd_cpu_clusters.cpp", "rows_cpu.cpp", "step_cpu.cpp"),
        *("cpu_baseline.cpp", "cpu_avx2.cpp", "cpu_avx512.cpp"),  # the kernels, once for each instruction set
    ),
    "cuda": ("cuda_ops.cpp", "sinkhorn_cuda.cu"),
}
SUFFIXES = (".h", ".cpp", ".cuh", ".cu")  # of the files that are shipped
PROGRESS = 10.0  # seconds from one word about a compiler to the next
TIMEOUT = 1800.0  # seconds for one command; a process that waits for another's build waits as long
MINIMUM_TORCH = (2, 11)  # the bindings use its stable ABI, which every later torch keeps
DEFAULT_ARCHS = (75, 80, 90, 120)
PORTABLE = 90  # its PTX serves 100, 103 and 110; that of the newest serves what comes later

# With the target, a header of a later torch offers only what the lowest one has.
TARGET = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*MINIMUM_TORCH)
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", TARGET)  # infinities and NaN keep their meaning, so never -ffast-math
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
# A symbol that is missing shows when the library is linked or loaded, not when it is called.
LINK_FLAGS = ("-z", "now", "-z", "defs")


class BuildError(RuntimeError):
    """A library could not be compiled; the message says why and what to do."""


def _silent(text: str) -> None:
    """Tell nobody."""


def build(backend: str, *, directory: Path | None = None, say: Say = _silent) -> Path:
    """Compile the library of ``backend`` into ``directory`` (the cache), unless it is there already; return its path.

    Any number of processes may call this at once: one compiles, the others wait for it. A process that dies leaves
    nothing that blocks the next, and no process ever sees part of a library.

    Args:
        say: is told what goes on: a library that is there already, a wait, the seconds that the compiler has taken.

    Raises:
        BuildError: no compiler, no place to write, an error of the compiler, or one that never ends.
    """
    reason = obstacle(backend)
    if reason is not None:
        raise BuildError(f"The {backend} library cannot be built here: {reason}")
    directory = cache_directory() if directory is None else Path(directory)
    command, archs = _command(backend)
    lowest = ".".join(map(str, MINIMUM_TORCH))
    kind = f"{backend}-{'.'.join(archs) or platform.machine()}-torch{lowest}"
    stem = f"{kind}-{_identity(backend)}-{_recipe(backend, command)}"
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            stack.enter_context(_locked(directory / f"{backend}.lock", say))
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"tmp-{backend}-", dir=directory)))
        except OSError as error:
            raise BuildError(
                f"The {backend} library has no place: {directory} cannot be written ({error}). Set PROTO_REG_CACHE to "
                "a directory that can."
            ) from error
        for path in directory.glob(f"{stem}-*.so"):
            if intact(path):
                say("already built")
                return path
            path.unlink(missing_ok=True)
        _remove_abandoned(directory, backend, scratch)
        output = scratch / "library.so"
        begin = time.monotonic()
        say("compiling ...")
        _run([*command, "-o", str(output)], f"compile the {backend} library", "Fix what it names, or set CXX.", say=say)
        _try_to_load(output)
        say(f"compiled in {time.monotonic() - begin:.0f} s")
        path = directory / f"{stem}-{_digest(output)}.so"
        output.replace(path)
    return path


def find(backend: str, capability: tuple[int, int] | None = None) -> Path | None:
    """The library of ``backend`` for these sources: the one inside the package, else one in the cache, else None.

    Compiles nothing and runs no process. ``capability`` is that of the GPU which a CUDA library has to serve.
    """
    return next((path for path, reason in candidates(backend, capability) if reason is None), None)


def candidates(backend: str, capability: tuple[int, int] | None = None) -> list[tuple[Path, str | None]]:
    """Every library of ``backend`` there is, the preferred one first, each with the reason against it or None."""
    found = []
    for directory in (PREBUILT, cache_directory()):
        ages = {}
        for path in directory.glob(f"{backend}-*-*-*-*-*.so"):
            with contextlib.suppress(OSError):  # gone since, or a link to nothing
                ages[path] = path.stat().st_mtime
        newest_first = sorted(ages, key=lambda path: ages[path], reverse=True)
        found += [(path, _objection(path, backend, capability)) for path in newest_first]
    return found


def obstacle(backend: str) -> str | None:
    """Why the library of ``backend`` cannot be built here, with the cure; None if nothing is known to be in the way."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}. Pick one.")
    missing = [name for name in SOURCES[backend] if not (CSRC / name).is_file()]
    if missing:
        return f"{', '.join(missing)} missing in {CSRC}. Reinstall proto_reg."
    if sys.platform != "linux":
        return f"compiled kernels need Linux, this is {sys.platform}. Use backend='torch'."
    try:
        too_old = _torch_objection()
    except ImportError:
        return "torch is not installed here. In an isolated build it never is: pip install --no-build-isolation ."
    if too_old is not None:
        return too_old
    if _host_compiler() is None:
        chosen = os.environ.get("CXX")
        came = f"CXX={chosen!r} is no command" if chosen else "none of g++, clang++, c++ is on PATH"
        return f"no C++ compiler: {came}. Install g++, or name a compiler with CXX."
    if backend == "cuda" and _nvcc() is None:
        return "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda. Install the CUDA toolkit, or set CUDA_HOME."
    return None


def cache_directory() -> Path:
    """Where built libraries are kept: PROTO_REG_CACHE, else XDG_CACHE_HOME/proto_reg, else ~/.cache/proto_reg."""
    chosen, shared = os.environ.get("PROTO_REG_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = os.path.expanduser(chosen or f"{shared}/proto_reg")  # noqa: PTH111 (pathlib's raises without a home)
    # Without a home there is no place to read or write: builds ask for PROTO_REG_CACHE.
    return Path(os.devnull) / "proto_reg" if path.startswith("~") else Path(path).absolute()


def intact(path: Path) -> bool:
    """Whether the file still is what was built: loading a truncated library would end the process."""
    try:
        return path.stem.rpartition("-")[2] == _digest(path)
    except OSError:
        return False


def _objection(path: Path, backend: str, capability: tuple[int, int] | None) -> str | None:
    archs, _, identity = path.stem.split("-")[1:4]
    if (too_old := _torch_objection()) is not None:
        return too_old
    if identity != _identity(backend):
        return "built from other sources or for another platform."
    if capability is not None and not _serves(archs.split("."), capability):
        return f"built for the architectures {archs}, this GPU's is {capability[0]}{capability[1]}."
    return None if intact(path) else "damaged: its content is not what was built."


def _serves(archs: list[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on the same major version from its minor on, PTX on every later architecture."""
    wanted = capability[0] * 10 + capability[1]
    for arch in archs:
        number = int(re.sub(r"\D", "", arch))
        if arch.endswith("a"):
            if number == wanted:
                return True
        elif number <= wanted and (arch.endswith("ptx") or number // 10 == capability[0]):
            return True
    return False


def _command(backend: str) -> tuple[list[str], list[str]]:
    """The compiler's command without its output, and the architectures it compiles for."""
    from torch.utils import cpp_extension  # costs more than the rest of the package: never at import

    sources = [str(CSRC / name) for name in SOURCES[backend]]
    headers = [CSRC, *map(Path, cpp_extension.include_paths())]
    includes = [f"-I{path}" for path in headers]
    # Messages name a source as csrc/binding.h:30, so that the same sources make the same library wherever they lie.
    names = [f"-fmacro-prefix-map={path}={path.name}" for path in headers]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    host, link = ",".join(HOST_FLAGS), ",".join(LINK_FLAGS)
    compiler = _host_compiler() or ""
    if backend == "cpu":
        return [compiler, "-shared", *FLAGS, *HOST_FLAGS, *names, f"-Wl,{link}", *includes, *sources, *libraries], []
    import torch

    nvcc = _nvcc() or ""
    archs = _architectures(nvcc)
    codes = []
    for arch in archs:
        number, ptx = arch.removesuffix("ptx"), arch.endswith("ptx")
        codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        codes += [f"-gencode=arch=compute_{number},code=compute_{number}"] if ptx else []
    if torch.version.cuda is not None:  # without it a CUDA library still loads and registers: tests use that
        libraries += ["-Xlinker", "--no-as-needed", "-ltorch_cuda"]
    hosts = [f"-Xcompiler={flag}" for flag in (host, *names)]
    options = ["-ccbin", compiler, *hosts, f"-Xlinker={link}", "-cudart=static", "--threads=0", *codes]
    return [nvcc, "-shared", *FLAGS, *options, *includes, *sources, *libraries], archs


def _architectures(nvcc: str) -> list[str]:
    """PROTO_REG_CUDA_ARCHS, else those of the GPUs in sight, else a list for the GPUs people have."""
    if chosen := os.environ.get("PROTO_REG_CUDA_ARCHS"):
        archs = [arch.replace(".", "").lower() for arch in re.split(r"[;,\s]+", chosen.strip())]
        archs = [re.sub(r"\+?ptx$", "ptx", arch) for arch in archs]
        if not all(re.fullmatch(r"\d{2,3}a?(ptx)?", arch) for arch in archs):
            raise BuildError(f"PROTO_REG_CUDA_ARCHS: expected a list such as '80;90' or '90+PTX', got {chosen!r}.")
        return sorted(set(archs))
    import torch

    listed = _output([nvcc, "--list-gpu-code"], "ask nvcc for its architectures")
    known = {int(number) for number in re.findall(r"sm_(\d+)\b", listed)}
    seen = {
        major * 10 + minor
        for index in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(index)]
    }
    if seen and seen <= known:
        return [str(number) for number in sorted(seen)]
    fat = [number for number in DEFAULT_ARCHS if number in known] or sorted(known)[-1:]
    return [f"{number}ptx" if number in (PORTABLE, fat[-1]) else str(number) for number in fat]


def _host_compiler() -> str | None:
    if chosen := os.environ.get("CXX"):
        return shutil.which(chosen)
    return next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    places = [str(Path(home) / "bin" / "nvcc")] if home else []
    return next(filter(None, map(shutil.which, (*places, "nvcc", "/usr/local/cuda/bin/nvcc"))), None)


def _torch_objection() -> str | None:
    """What is against the installed torch, with the cure; None if libraries can be built with it and loaded into it."""
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= MINIMUM_TORCH:
        return None
    lowest = ".".join(map(str, MINIMUM_TORCH))
    return f"compiled kernels need torch {lowest} or later, this is {torch.__version__}. Upgrade it."


def _identity(backend: str) -> str:
    import torch

    (other,) = set(BACKENDS) - {backend}  # files with its name in theirs do not belong to this one
    files = sorted(path for path in CSRC.iterdir() if path.suffix in SUFFIXES and other not in path.name)
    content = [part for path in files for part in (path.name, path.read_bytes())]
    toolkit = str(torch.version.cuda) if backend == "cuda" else ""  # the library links to torch's own CUDA part
    return _hash(backend, TARGET, toolkit, sys.platform, platform.machine(), *content)


def _recipe(backend: str, command: list[str]) -> str:
    """Hash of what the library is made with. Paths are left out: versions and content say what lies there."""
    versions = [_version(compiler) for compiler in (command[0], _host_compiler()) if compiler]
    flags = [part for part in command if not re.search("(^|^-I|^-L|=)/", part)]
    return _hash(_identity(backend), *versions, *SOURCES[backend], *flags)


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:12]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _version(compiler: str) -> str:
    return _output([compiler, "--version"], "ask the compiler for its version")


def _try_to_load(library: Path) -> None:
    """Load it in another process first: a registration that fails ends the process it happens in."""
    code = "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1])"
    path = os.pathsep.join(filter(None, sys.path))
    cure = "Please report this with the versions that python -m proto_reg backends prints."
    _run(
        [sys.executable or "python3", "-c", code, str(library)],
        "load the new library",
        cure,
        {**os.environ, "PYTHONPATH": path},
    )


def _output(command: list[str], purpose: str) -> str:
    return _run(command, purpose, "Check that it runs by itself.")


def _run(
    command: list[str], purpose: str, cure: str, environment: dict[str, str] | None = None, say: Say = _silent
) -> str:
    """Its output; BuildError with what matters of it if it fails or takes longer than TIMEOUT."""
    try:
        # A session of its own, so that the compiler's own children can be ended with it.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    except OSError as error:
        raise BuildError(f"Could not {purpose}: {shlex.join(command)}: {error}. {cure}") from error
    try:
        output = _waited_for(process, say)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise BuildError(f"Could not {purpose}: stopped after {TIMEOUT:g} s. {shlex.join(command)}\n{cure}") from error
    text = output.decode(errors="replace")
    if process.returncode != 0:
        lines = text.splitlines()
        errors = [line for line in lines if "error" in line.lower()][:10]
        shown = "\n".join([*errors, *(line for line in lines[-10:] if line not in errors)])
        raise BuildError(
            f"Could not {purpose}: exit status {process.returncode}. {cure}\n{shlex.join(command)}\n{shown}"
        )
    return text


def _waited_for(process: subprocess.Popen, say: Say) -> bytes:
    """The output of a ``process`` that ends within TIMEOUT."""
    begin = time.monotonic()
    while True:
        left = begin + TIMEOUT - time.monotonic()
        try:
            return process.communicate(timeout=min(PROGRESS, max(left, 0)))[0]
        except subprocess.TimeoutExpired:
            if left <= PROGRESS:
                raise
            say(f"compiling ... {time.monotonic() - begin:.0f} s")


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Hold the lock, which the system takes back from a process that dies.

    Where a file system has none, builders do not wait for each other: work is done twice, the result is the same.
    """
    with path.open("a") as file:
        deadline, waiting = time.monotonic() + TIMEOUT, False
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"Another process has held {path} for {TIMEOUT:g} s. End it, or set PROTO_REG_CACHE to "
                        "another directory."
                    ) from None
                if not waiting:
                    say("waiting for another build")
                waiting = True
                time.sleep(0.05)
            except OSError:
                break
            else:
                break
        yield


def _remove_abandoned(directory: Path, backend: str, own: Path) -> None:
    """Delete what builders that were killed left behind; one that lives could not have outlasted TIMEOUT."""
    for path in directory.glob(f"tmp-{backend}-*"):
        with contextlib.suppress(OSError):
            if path != own and time.time() - path.stat().st_mtime > 3 * TIMEOUT:
                shutil.rmtree(path)
