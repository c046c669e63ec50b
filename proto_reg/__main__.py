"""``python -m proto_reg``: which backends run here and why not; builds them, and times them on this machine."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
from collections.abc import Sequence

import torch

from . import _bench
from .kernels import backends, build


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m proto_reg", description="The backends that compute proto_reg.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("backends", help="which backends run here, from where, and why the others do not")
    builder = commands.add_parser("build", help="compile a backend's library into the cache")
    builder.add_argument("backend", choices=[*build.BACKENDS, "all"])
    _add_bench(commands.add_parser("bench", help="time every backend on this machine", description=_bench.__doc__))
    arguments = parser.parse_args(argv)
    if arguments.command == "backends":
        return _say(*_report())
    if arguments.command == "build":
        return _build(build.BACKENDS if arguments.backend == "all" else (arguments.backend,))
    if arguments.command == "bench":
        return _time(arguments)
    parser.print_help()
    return 0


def _add_bench(bench: argparse.ArgumentParser) -> None:
    """The options of ``bench``."""
    names = ", ".join(_bench.NAMED)
    bench.add_argument(
        "--shapes", nargs="+", type=_shapes, default=[_bench.SHAPES], metavar="SHAPE", help=f"BxK, or of {names}"
    )
    bench.add_argument("--threads", type=_counts, help="of PyTorch on the CPU, such as 1,2")
    bench.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    bench.add_argument("--seconds", type=float, default=1.0, help="about, for each shape (default: 1)")
    bench.add_argument("--backward", action="store_true", help="time the codes and their gradient by the scores")
    bench.add_argument("--compile", action="store_true", help="also time torch.compile of SwAV's rule")


def _shapes(text: str) -> list[str]:
    """``"tiny,256x30"`` as a list; ValueError for a shape that there is not."""
    for name in text.split(","):
        if name not in _bench.NAMED:
            _bench.shape(name)
    return text.split(",")


def _counts(text: str) -> list[int]:
    """``"1,2"`` as numbers >= 1."""
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError(text)
    return counts


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
    for name in backends.NAMES[2:]:
        place = "cpu" if name == "cpu" else "cuda"
        device = torch.device(place) if name == "cpu" or gpus else None
        against = backends.reasons(name, device)
        if name == "cuda" and not gpus:
            against.append("no GPU in sight: torch.cuda.device_count() is 0.")
        state = f"runs from {backends.loaded(name)}" if not against else "does not run:"
        lines += [f"{name}: {state}", *(f"  - {reason}" for reason in against)]
    return lines


def _build(names: Sequence[str]) -> int:
    status = 0
    for name in names:

        def say(text: str, name: str = name) -> None:
            _say(f"{name}: {text}")

        try:
            say(str(build.build(name, say=say)))
        except build.BuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
    return status


def _time(arguments: argparse.Namespace) -> int:
    """Print the table of this machine. The exit status is 1 if codes of a backend are wrong."""
    device = torch.device(arguments.device)
    rows: list[list[str]] = []
    for threads in arguments.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        if not rows:
            _say(_bench.environment(device), _bench.SETTING)
        field = _bench.contenders(device, backward=arguments.backward, compiled=arguments.compile)
        for text in itertools.chain(*arguments.shapes):
            case = _bench.case(text, device)
            rows += _bench.rows(case, arguments.seconds, field, backward=arguments.backward)
    _say(_bench.table(_bench.HEADER, rows))
    for name in backends.NAMES[1:]:
        if name == "cuda" and not torch.cuda.is_available():
            _say("cuda did not run: PyTorch sees no GPU here.")
        elif name in ("torch", device.type):
            _say(*(f"{name} did not run: {reason}" for reason in backends.reasons(name, device)))
        else:
            _say(f"{name} did not run: it needs --device {name}.")
    return int(any(_bench.WRONG in row for row in rows))


def _say(*lines: str) -> int:
    if lines:
        print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
