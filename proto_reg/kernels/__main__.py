"""``python -m proto_reg.kernels``: which backends there are, from where, and why not; builds and times them."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence

import torch

from . import backends, build


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["bench"]:  # has options of its own
        from .. import bench

        return bench.main(argv[1:]) or 0
    parser = argparse.ArgumentParser(prog="python -m proto_reg.kernels", description="Compiled kernels.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("report", help="which backends can run here, from where, and why not (the default)")
    builder = commands.add_parser("build", help="compile a library into the cache")
    builder.add_argument("backend", choices=[*build.BACKENDS, "all"])
    commands.add_parser("bench", help="time every backend on this machine", add_help=False)
    arguments = parser.parse_args(argv)
    if arguments.command == "build":
        return _build(build.BACKENDS if arguments.backend == "all" else (arguments.backend,))
    _say(*_report())
    return 0


def _build(names: Sequence[str]) -> int:
    status = 0
    for name in names:
        _say(f"{name}: building ...")
        try:
            _say(f"{name}: {build.build(name)}")
        except build.BuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
    return status


def _report() -> list[str]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"GPUs: {', '.join(gpus) or 'none'}",
        f"cache: {build.cache_directory()}",
    ]
    for name in ("PROTO_REG_BACKEND", "PROTO_REG_BUILD", "PROTO_REG_CUDA_ARCHS"):
        if name in os.environ:
            lines.append(f"{name}={os.environ[name]}")
    lines += ["", "torch: runs everywhere, in every dtype"]
    for name in build.BACKENDS:
        device = torch.device(name) if name == "cpu" or gpus else None
        against = backends.reasons(name, device)
        if name == "cuda" and not gpus:
            against.append("no GPU in sight: torch.cuda.device_count() is 0.")
        state = f"runs from {backends.loaded(name)}" if not against else "does not run:"
        lines += [f"{name}: {state}", *(f"  - {reason}" for reason in against)]
    return lines


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
