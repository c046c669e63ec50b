"""Balanced assignment by other methods and packages: what the benchmark compares with.

Each is ``method(scores, epsilon, num_iters)`` for scores (..., B, K), a package's own for (B, K) alone, and returns
codes like them. No code here is copied from a peer. None of the packages is a dependency.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Method = Callable[[Tensor, float, int], Any]


def swav(scores: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """SwAV's algorithm with the operations of its listing (Caron et al. 2020), in place where no graph is kept."""
    divide = Tensor.div if scores.requires_grad else Tensor.div_
    q = torch.exp(scores / epsilon).transpose(-1, -2)
    columns, rows = q.shape[-2:]
    q = divide(q, q.sum((-2, -1), keepdim=True))
    for _ in range(num_iters):
        q = divide(divide(q, q.sum(-1, keepdim=True)), columns)
        q = divide(divide(q, q.sum(-2, keepdim=True)), rows)
    return divide(q, 1 / rows).transpose(-1, -2)


def exp_once(scores: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """exp(S / eps) once, and then matrix-vector products: the quick way by hand, for a narrow range of scores."""
    e = ((scores - scores.detach().amax((-2, -1), keepdim=True)) / epsilon).exp()
    target = e.shape[-2] / e.shape[-1]
    v = target / e.sum(-2, keepdim=True).mT
    for _ in range(num_iters - 1):
        v = target / (e.mT @ (1 / (e @ v)))
    return e * v.mT / (e @ v)


def compiled_swav() -> Method:
    """:func:`swav` by ``torch.compile``, which needs a C++ compiler."""
    torch.compiler.reset()
    return torch.compile(swav, dynamic=False)


def _pot() -> Method:
    ot = importlib.import_module("ot")

    def method(scores: Tensor, epsilon: float, num_iters: int) -> Tensor:
        rows, columns = scores.shape
        a, b = scores.new_full((rows,), 1 / rows), scores.new_full((columns,), 1 / columns)
        return ot.bregman.sinkhorn_log(a, b, -scores, epsilon, numItermax=num_iters, stopThr=0, warn=False) * rows

    return method


def _geomloss() -> Method:
    """Symmetric updates with annealing. This iterate is different: its rows do not sum to 1 before it converges."""
    ot = importlib.import_module("geomloss.ot")

    def method(scores: Tensor, epsilon: float, num_iters: int) -> Tensor:
        grad = torch.is_grad_enabled()
        try:
            return ot.solve(-scores, reg=epsilon, max_iter=num_iters).plan * len(scores)
        finally:
            torch.set_grad_enabled(grad)  # it leaves autograd off after an error

    return method


def _ott() -> Method:
    """OTT-jax in its log domain, compiled. It takes scores and returns codes without a copy, and no gradient."""
    # jax reads this at its start. It then has as many threads as PyTorch.
    one = torch.get_num_threads() == 1
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false" if one else "")
    os.environ.setdefault("NPROC", str(torch.get_num_threads()))
    jax = importlib.import_module("jax")
    geometry = importlib.import_module("ott.geometry.geometry")
    problem = importlib.import_module("ott.problems.linear.linear_problem")
    linear = importlib.import_module("ott.solvers.linear.sinkhorn")

    def codes(x: Any, epsilon: float, num_iters: int) -> Any:
        counts = {"min_iterations": num_iters, "max_iterations": num_iters, "inner_iterations": num_iters}
        cost = geometry.Geometry(cost_matrix=-x, epsilon=epsilon)
        solver = linear.Sinkhorn(lse_mode=True, threshold=-1.0, **counts)
        return solver(problem.LinearProblem(cost)).matrix * x.shape[0]

    compiled = jax.jit(codes, static_argnums=(1, 2))
    return lambda scores, *options: compiled(jax.dlpack.from_dlpack(scores), *options).block_until_ready()


# For each package: a function that loads it, and the command that installs it.
PACKAGES: dict[str, tuple[Callable[[], Method], str]] = {
    "POT sinkhorn_log": (_pot, "pip install POT"),
    "OTT-jax lse": (_ott, "pip install ott-jax"),
    "geomloss": (_geomloss, "pip install geomloss"),
}


def installed() -> dict[str, Method]:
    """The methods of the packages that are installed, by name."""
    found = {}
    for name, (load, _) in PACKAGES.items():
        try:
            found[name] = load()
        except ImportError:
            continue
    return found
