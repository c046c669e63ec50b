"""The layer's cost. The program of its table runs. ``--benchmark-enable`` times the layer with and without kernels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from proto_reg import PrototypicalRegularizer


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_table_runs(processes: int) -> None:
    script = Path(__file__).with_name("layer_cost.py")
    options = ["--models", "quickstart, 8x8", "--seconds", "0.1", "--processes", str(processes)]
    command = [sys.executable, "-W", "ignore", str(script), *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "| quickstart, 8x8 |" in printed


@pytest.mark.parametrize(("rows", "dim"), [(48, 32), (256, 256)], ids="{0}".format)
def test_forward_and_backward(benchmark, rows: int, dim: int, backend: str) -> None:
    layer = PrototypicalRegularizer(dim, 30)
    z, gradient = torch.randn(rows, dim, requires_grad=True), torch.randn(rows, dim)

    def step() -> None:
        z.grad = layer.head.prototypes.grad = None
        layer(z)[0].backward(gradient)

    step()
    assert z.grad.isfinite().all()
    benchmark.group = f"layer, {rows} x {dim}, K = 30, {backend}"
    benchmark(step)
