"""The paper's experiments and their baselines.

python -m examples.paper run --config digits --out OUT                      # needs no files
python -m examples.paper run --config mnist-small --data-dir DIR --out OUT  # a new start goes on after a kill
python -m examples.paper report --results OUT                               # tables, figures and verdicts

Results go to OUT/runs.jsonl and OUT/arrays. Each finished or failed run has a JSON line. Checkpoints go to OUT/work.
Two of the same commands at the same time share the work. Without OUT, results go to the repository's own results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .data import SPLITS

RESULTS = Path(__file__).parent / "results"


def run(args: argparse.Namespace) -> int:
    """Train and judge. Return 1 if any run has failed."""
    from .config import load_config
    from .session import Session, runs_of

    config = load_config(args.config)
    runs = runs_of(config, args.split, args.seeds, args.only)
    out = args.out or (RESULTS if args.split == "test" else RESULTS / "work" / "validation")
    session = Session(out, torch.device(args.device), args.retry, args.again, args.far_dir)
    print(
        f"{config.name}: {len(runs)} runs, {len(session.pending(runs))} to do, seeds {sorted({r.seed for r in runs})}"
    )
    records = session.run(runs, args.data_dir)
    failed = [record for record in records if record["status"] == "failed"]
    for record in failed:
        print(f"FAILED {record['label']}, seed {record['seed']}:\n{record['error']}", file=sys.stderr)
    print(f"{len(records) - len(failed)} of {len(runs)} runs in {out / 'runs.jsonl'}, {len(failed)} failed")
    return int(bool(failed))


def report(args: argparse.Namespace) -> int:
    """Make the tables, figures and verdicts from the records alone."""
    from .report import build

    page = build(args.results, args.out or args.results)
    print(page, *(line for line in page.read_text().splitlines() if line.startswith("Arrays of ")), sep="\n")
    return 0


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m examples.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = commands.add_subparsers(required=True)
    runner = which.add_parser("run", help="train and judge the runs that are not done")
    runner.add_argument("--config", required=True, help="a name in configs/, or a YAML file")
    runner.add_argument("--data-dir", type=Path, help="folder of IDX files or CIFAR's python version")
    runner.add_argument("--far-dir", type=Path, help="another data set, which priors should tell apart (AUROC)")
    runner.add_argument("--only", nargs="+", metavar="METHOD", help="methods or labels to run")
    runner.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1; default: the config's")
    runner.add_argument("--out", type=Path, help=f"default: {RESULTS.relative_to(Path(__file__).parents[2])}")
    runner.add_argument("--split", choices=SPLITS, default="test", help="validation images are for tuning")
    runner.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    runner.add_argument("--retry", action="store_true", help="also train failed runs again")
    runner.add_argument("--again", action="store_true", help="evaluate finished runs again, from checkpoints")
    runner.set_defaults(do=run)
    reporter = which.add_parser("report", help="make the page from the records")
    reporter.add_argument("--results", type=Path, default=RESULTS)
    reporter.add_argument("--out", type=Path, help="default: the results folder")
    reporter.set_defaults(do=report)
    return commands


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        return args.do(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
