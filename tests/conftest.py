"""The tests share this file: seeds, and slow but plain formulas that the library is compared with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import proto_reg
from proto_reg import PrototypicalRegularizer, Schedule
from proto_reg.kernels import backends, build, closed_forms

warnings.simplefilter("ignore", proto_reg.PrototypeWarning)

# The workers of pytest-xdist share the cores. With more threads than cores, threads wait for threads that do not run.
# Some tests then take ten times as long.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start

# The slowest test files. The slowest one comes first.
LONGEST = (
    "test_cuda_library.py",
    "test_regularizer.py",
    "test_guarantees.py",
    "test_examples.py",
    "test_distributed.py",
    "test_packaging.py",
    "test_run.py",
    "test_replay.py",
    "test_sinkhorn.py",
    "test_cures.py",
    "test_cuda_source.py",
    "test_cpu_kernel.py",
    "test_cross_entropy.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # else pytest-xdist begins with the files that have most tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give the slowest files to the workers first, so that all workers end at about the same time."""
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# In tests the prototypes act from the first step. The marker warm_up gives a test the schedule that users get.
DEFAULTS = Schedule.__init__.__defaults__
Schedule.__init__.__defaults__ = tuple(0 if value == Schedule.mmd_steps else value for value in DEFAULTS)


@pytest.fixture(autouse=True)
def default_schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "warm_up" in request.keywords:
        monkeypatch.setattr(Schedule.__init__, "__defaults__", DEFAULTS)


def untracked(layer: PrototypicalRegularizer) -> PrototypicalRegularizer:
    """Return the layer. It counts nothing from now on."""
    layer.tracking = False
    return layer


@pytest.fixture(scope="session", autouse=True)
def built() -> Path | None:
    """The compiled CPU library in the user's cache. If it builds here, ``backend="auto"`` uses it in every test."""
    return None if build.obstacle("cpu") else build.build("cpu")


@pytest.fixture(scope="session")
def kept(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function that returns a folder for compiled files, from a name and a hash.

    The hash covers everything that decides the compiler's output. The folder is in pytest's cache, where the next run
    finds it. The function deletes a folder of another hash.
    """
    cache = getattr(pytestconfig, "cache", None)

    def folder(name: str, key: str) -> Path:
        parent = Path(cache.mkdir(name)) if cache else tmp_path_factory.mktemp(name)
        for other in parent.iterdir():
            if other.name != key:
                shutil.rmtree(other)
        (parent / key).mkdir(exist_ok=True)
        return parent / key

    return folder


@pytest.fixture
def cpu_library(built: Path | None) -> Iterator[Path]:
    """The compiled CPU library, for tests that need it. PROTO_REG_BACKEND is unset during these tests."""
    if built is None:
        pytest.skip(build.obstacle("cpu"))
    if "PROTO_REG_BACKEND" not in os.environ:
        yield built
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PROTO_REG_BACKEND")
        backends._reset()
        yield built
    backends._reset()


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend for float32 and half precision on the CPU in a test that does not choose a backend itself."""
    if request.param == "cpu":
        request.getfixturevalue("cpu_library")
    else:
        monkeypatch.setenv("PROTO_REG_BACKEND", "torch")
    backends._reset()
    yield request.param
    monkeypatch.undo()
    backends._reset()


def naive_mmd(
    z: Tensor, v: Tensor, assignments: Tensor, kernel: str, scales: tuple[float, ...], unbiased: bool
) -> Tensor:
    """The MMD, cluster by cluster and pair by pair, in plain differentiable torch."""
    total = z.new_zeros(())
    for k in range(len(v)):
        r = z[assignments == k] - v[k]
        n, dim = r.shape
        if n < 2:
            continue
        off = ~torch.eye(n, dtype=torch.bool)
        squared = (r[:, None] - r[None, :])[off].square().sum(-1)
        pairs = kernel_value(kernel, squared, dim, scales).sum()
        pairs = pairs / (n * (n - 1)) if unbiased else (pairs + n * closed_forms.diagonal(kernel)) / n**2
        a, slope = closed_forms.attraction(kernel, r.detach().square().sum(1), dim, scales)
        # This ties the closed form a and its slope together for autograd.
        a = a + slope * (r.square().sum(1) - r.detach().square().sum(1))
        total = total + n / len(z) * (pairs - 2 * a.mean() + closed_forms.self_term(kernel, dim, scales))
    return total


def kernel_value(kernel: str, squared: Tensor, dim: int, scales: tuple[float, ...]) -> Tensor:
    """The kernels, by the formulas in the documentation."""
    if kernel == "gaussian":
        return torch.stack([(-squared / (2 * dim * s)).exp() for s in scales]).mean(0)
    if kernel == "imq":
        return torch.stack([2 * dim * s / (2 * dim * s + squared) for s in scales]).mean(0)
    return -squared.sqrt()


def balanced(
    scores: Tensor,
    epsilon: float = 0.05,
    num_iters: int = 3,
    marginals: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The Sinkhorn iterate of a matrix by its definition, in float64 and in the log domain: codes and potentials."""
    x = scores.double() / epsilon
    rows, columns = x.shape
    target = torch.full((columns,), 1 / columns, dtype=torch.float64) if marginals is None else marginals.double()
    w = torch.ones(rows, dtype=torch.float64) if weights is None else weights.double()
    f, counts = torch.zeros(rows, 1, dtype=torch.float64), w > 0
    for _ in range(num_iters):
        g = target.log() - (x + f + w.log()[:, None])[counts].logsumexp(0)
        g = torch.where(g == torch.inf, -torch.inf, g)
        f = -w.sum().log() - (x + g).logsumexp(1, keepdim=True)
    return (x + g).softmax(1), g


def log_sinkhorn(scores: Tensor, epsilon: float, num_iters: int, marginals: Tensor | None = None) -> Tensor:
    """The codes of :func:`balanced`, for rows of one weight."""
    return balanced(scores, epsilon, num_iters, marginals)[0]


def swav_sinkhorn(scores: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """SwAV's algorithm as its paper prints it."""
    q = (scores / epsilon).exp().T
    columns, rows = q.shape
    q = q / q.sum()
    for _ in range(num_iters):
        q = q / q.sum(1, keepdim=True) / columns
        q = q / q.sum(0, keepdim=True) / rows
    return (q * rows).T


def cosines(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosine scores of random vectors in 16 dimensions."""
    z, v = torch.randn(rows, 16, dtype=dtype), torch.randn(columns, 16, dtype=dtype)
    return torch.nn.functional.normalize(z, dim=1) @ torch.nn.functional.normalize(v, dim=1).T


def across_instruction_sets(code: str, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Run ``code`` with each instruction set. Yield pairs of tensors: one by baseline code, one by another set.

    ``code`` saves a list of tensors to ``sys.argv[1]``.
    """
    found = []
    for isa in ("baseline", "avx2", "avx512"):  # a machine without one of these takes the next lower one
        target = folder / f"{isa}.pt"
        environment = dict(os.environ, PROTO_REG_CPU_ISA=isa)
        subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(target)], check=True, env=environment)
        found.append(torch.load(target))
    for other in found[1:]:
        yield from zip(found[0], other, strict=True)
