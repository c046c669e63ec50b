"""Compile the Triton kernels for one GPU and print the bytes that each spills: ``python triton_spills.py 90``."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from proto_reg.kernels import sinkhorn_triton, sinkhorn_triton_gradient

MATRICES = ("scores", "codes", "gradient", "by_codes", "by_scores")
VECTORS = ("marginals", "weights", "potentials", "loss", "losses", "partials", "totals", "state")
BACK = ("by_potentials", "by_shares", "by_weights", "history", "a", "after")
FLOATS = ("scale", "eighths", "tol", "sharpness", "slope", "inverse")
FLAGS = ("MARGINALS", "WEIGHTS", "ISOLATE", "TOL", "CODES", "ENTROPY", "POTENTIALS", "START")


def spilled(kernel, target: GPUTarget, warps: int, **sizes: int) -> int:
    flags = {**dict.fromkeys(FLAGS, True), **sizes}
    constants = {name: flags[name] for name in kernel.arg_names if name in flags}
    kinds = {
        **dict.fromkeys(MATRICES, "*fp32"),
        **dict.fromkeys((*VECTORS, *BACK), "*fp32"),
        **dict.fromkeys(FLOATS, "fp32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps, **sinkhorn_triton.OPTIONS}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        return int(re.search(r"private_segment_fixed_size: +(\d+)", compiled.asm["amdgcn"]).group(1))
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"]).group(1)
        command = [get_ptxas(target.arch).path, "-v", f"-arch={architecture}", str(source), "-o", f"{folder}/kernel"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stack, stores = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report).groups()
    return int(stack) + int(stores)


def main(name: str) -> None:
    target = GPUTarget("cuda", int(name), 32) if name.isdigit() else GPUTarget("hip", name, 64)
    t = sinkhorn_triton
    for rows, columns, entropy in ((256, 32, False), (128, 64, False), (128, 64, True), (16, 512, False)):
        size = rows * columns
        assert size <= t.ON_CHIP
        bytes_ = spilled(t._one, target, t.warps(size), BB=rows, BK=columns, ENTROPY=entropy)
        print("_one", rows, columns, bytes_, flush=True)
    for count in (64, t.WIDEST):
        rows, columns = t.tile(count)
        for kernel in (t._start, t._pass, t._write):
            warps = t.warps(rows * columns)
            print(kernel.__name__, rows, columns, spilled(kernel, target, warps, BR=rows, BK=columns), flush=True)
    print("_settle", spilled(t._settle, target, t.warps(t.WIDEST), BK=t.WIDEST))
    for kernel in (t._sum_start, t._sum_pass):
        print(kernel.__name__, spilled(kernel, target, 4, BP=64, BC=32))
    print("_settle 64", spilled(t._settle, target, t.warps(64), BK=64))
    back(target)


def back(target: GPUTarget) -> None:
    """The kernels of the gradient."""
    t, g = sinkhorn_triton, sinkhorn_triton_gradient
    for rows, columns in ((256, 16), (64, 64), (16, 256)):
        assert 2 * rows * columns == t.ON_CHIP
        bytes_ = spilled(g._one_back, target, t.warps(rows * columns), BB=rows, BK=columns)
        print("_one_back", rows, columns, bytes_, flush=True)
    for count in (64, t.WIDEST):
        rows, columns = g.tile_back(count)
        for stage in ("CODES", "iteration", "START"):
            stages = {name: name == stage for name in ("CODES", "START")}
            bytes_ = spilled(g._pass_back, target, g.WARPS, BR=rows, BK=columns, **stages)
            print("_pass_back", stage, rows, columns, bytes_, flush=True)
    for codes in (True, False):
        print("_sum_back", codes, spilled(g._sum_back, target, 4, BP=64, BC=32, CODES=codes))


if __name__ == "__main__":
    main(sys.argv[1])
