"""The cost of the anchored MMD: ``pytest tests/benchmarks --benchmark-enable``. Without this flag each runs once."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import partial

import pytest
import torch

from proto_reg import _bench
from proto_reg.functional import anchored_mmd

CODE = """
import resource, torch
from proto_reg.functional import anchored_mmd

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB on Linux

z, v = torch.randn(65_536, 64, requires_grad=True), torch.randn(100, 64)
assignments = {assignments}
anchored_mmd(z[:500], v, assignments[:500]).backward()
before = peak()
anchored_mmd(z, v, assignments).backward()
print(peak() - before)
"""


@pytest.mark.parametrize(
    "assignments",
    ["torch.randint(100, (65_536,))", "torch.randint(100, (65_536,)) * (torch.rand(65_536) > .2)"],
    ids=["even", "a fifth at one prototype"],
)
def test_memory_at_65536_latents_stays_below_2_gb(benchmark, assignments: str) -> None:
    """Forward and backward run with B = 65,536, K = 100 and D = 64. A B x B matrix would take 16 GB."""

    def measure() -> float:
        code = CODE.format(assignments=assignments)
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    extra = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["extra_gib"] = extra
    print(f"extra memory: {extra:.2f} GiB")
    assert extra < 2e9 / 2**30


def loop(z: torch.Tensor, v: torch.Tensor, assignments: torch.Tensor) -> torch.Tensor:
    """A loop over the prototypes, as the simplest program has it."""
    scales, dim = (0.25, 0.5, 1, 2, 4, 8), z.shape[1]
    total = z.new_zeros(())
    for k in range(len(v)):
        r = z[assignments == k] - v[k]
        n = len(r)
        if n < 2:
            continue
        squared = torch.cdist(r, r).square()
        norms = r.square().sum(1)
        for s2 in (dim * s for s in scales):
            gram = (-squared / (2 * s2)).exp()
            a = (s2 / (s2 + 1)) ** (dim / 2) * (-norms / (2 * (s2 + 1))).exp()
            b = (s2 / (s2 + 2)) ** (dim / 2)
            total = total + n / len(z) / 6 * ((gram.sum() - n) / (n * (n - 1)) - 2 * a.mean() + b)
    return total


@pytest.mark.parametrize("form", ["loop", *_bench.usable_backends(torch.device("cpu"))])
@pytest.mark.parametrize(("rows", "groups", "dim"), [(256, 30, 256), (2048, 30, 4), (2048, 100, 256), (8192, 100, 64)])
def test_forward_and_backward(benchmark, rows: int, groups: int, dim: int, form: str) -> None:
    z, v = torch.randn(rows, dim, requires_grad=True), torch.randn(groups, dim)
    assignments = torch.randint(groups, (rows,))
    function = loop if form == "loop" else partial(anchored_mmd, backend=form)
    expected = anchored_mmd(z.double(), v.double(), assignments).float()
    torch.testing.assert_close(function(z, v, assignments), expected, atol=1e-4, rtol=1e-3)
    benchmark.group = f"{rows} x {dim}, K = {groups}"
    benchmark(lambda: function(z, v, assignments).backward())


def test_peak_memory_is_measured_in_kibibytes_here() -> None:
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 50_000
