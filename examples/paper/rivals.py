"""Ours against its rivals, when each method samples from its best prior: four goals, fixed before the runs.

A function takes the runs of one study. Means are over seeds. Ratios are between runs of the same seed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from .results import NAMES, Run, base, data_name, mean_of, ratio, written

OURS = "balanced-clusters"  # the goals are about it
AS_TRAINED = "balanced-trained"  # ours with nothing fitted after training
RIVALS = ("kmeans-clusters", "autoencoder-gmm", "rae-gmm", "vae-gmm", "wae-gmm")
REACHED, MISSED, UNMEASURED = "reached", "not reached", "not measured"
FID_MARGIN, RECALL_SHARE, CONTROL_GAIN = 1.0, 0.97, 0.03
LOWER_ERROR = ("MNIST", "Fashion-MNIST")  # data sets on which ours should reconstruct better than the autoencoder


class Goal(NamedTuple):
    name: str
    rule: str
    outcome: str
    numbers: str


def best_rival(runs: list[Run]) -> str | None:
    """The rival with the lowest FID, or None if there is none."""
    found = {method: mean_of(base(runs, method), "fid") for method in RIVALS}
    measured = {method: fid.mean for method, fid in found.items() if fid is not None}
    return min(measured, key=measured.__getitem__, default=None)


def plain(runs: list[Run]) -> list[Run]:
    """The runs with the plain autoencoder's error."""
    return base(runs, "autoencoder-gmm") or base(runs, "kmeans-clusters") or base(runs, "autoencoder")


def goals(runs: list[Run]) -> list[Goal]:
    """The four goals of ours. Without a run of ours and of a rival, none is measured."""
    rival = best_rival(runs)
    absent = [NAMES[method] for method in RIVALS if not base(runs, method)]

    def judged(goal: tuple[str, str, Callable[[], tuple[bool, str] | None]]) -> Goal:
        name, rule, judge = goal
        found = judge() if rival and base(runs, OURS) else None
        if found is None:
            return Goal(name, rule, UNMEASURED, "no runs")
        reached, numbers = found
        if reached and absent and name != "error":  # a better rival may be missing
            return Goal(name, rule, UNMEASURED, f"{numbers}; no runs of {', '.join(absent)}")
        return Goal(name, rule, REACHED if reached else MISSED, numbers)

    ours, its = base(runs, OURS), base(runs, rival) if rival else []
    limit = error_limit(runs)
    return [
        judged(("FID", f"at most {FID_MARGIN:g} above the rival's", lambda: _fid(ours, its))),
        judged(("recall", f"at least {RECALL_SHARE:g} of the rival's", lambda: _recall(ours, its))),
        judged(
            ("control", f"at equal recall at least {CONTROL_GAIN:g} more than the rival", lambda: _control(ours, its))
        ),
        judged(
            ("error", f"test MSE at most {limit:.2f} of the autoencoder's", lambda: _error(ours, plain(runs), limit))
        ),
    ]


def error_limit(runs: list[Run]) -> float:
    return 0.90 if runs and data_name(runs[0]) in LOWER_ERROR else 1.02


def _fid(ours: list[Run], its: list[Run]) -> tuple[bool, str] | None:
    mine, other = mean_of(ours, "fid"), mean_of(its, "fid")
    if mine is None or other is None:
        return None
    return mine.mean <= other.mean + FID_MARGIN, f"{written(mine, '.1f')}, the rival {written(other, '.1f')}"


def _recall(ours: list[Run], its: list[Run]) -> tuple[bool, str] | None:
    mine, other = mean_of(ours, "recall"), mean_of(its, "recall")
    if mine is None or other is None:
        return None
    return mine.mean >= RECALL_SHARE * other.mean, f"{written(mine)}, the rival {written(other)}"


def _control(ours: list[Run], its: list[Run]) -> tuple[bool, str] | None:
    """Compare at the recall that the rival has with a spread of 1."""
    mine, other, recall = frontier(ours), frontier(its), mean_of(its, "recall@1")
    if not mine or not other or recall is None:
        return None
    its_control, own = control_at(other, recall.mean), control_at(mine, recall.mean)
    if own is None or its_control is None:
        return False, f"ours never has the rival's recall of {recall.mean:.3f}"
    numbers = f"{own - its_control:+.3f}: {own:.3f}, the rival {its_control:.3f}, at recall {recall.mean:.3f}"
    return own - its_control >= CONTROL_GAIN, numbers


def _error(ours: list[Run], autoencoder: list[Run], limit: float) -> tuple[bool, str] | None:
    found = ratio(ours, autoencoder, "test_mse")
    return None if found is None else (found.mean <= limit, written(found))


def frontier(runs: list[Run]) -> list[tuple[float, float]]:
    """Recall and control at each spread of the draw, in the order of the spreads."""
    names = {name.removeprefix("recall@") for run in runs for name in run["metrics"] if name.startswith("recall@")}
    return [point for spread in sorted(map(float, names)) if (point := frontier_at(runs, spread)) is not None]


def frontier_at(runs: list[Run], spread: float) -> tuple[float, float] | None:
    """Recall and control at one spread."""
    recall, control = mean_of(runs, f"recall@{spread:g}"), mean_of(runs, f"control@{spread:g}")
    return None if recall is None or control is None else (recall.mean, control.mean)


def control_at(curve: list[tuple[float, float]], recall: float) -> float | None:
    """The highest control with at least this recall, on the line through the points; None if it has less everywhere."""
    found = [control for reached, control in curve if reached >= recall]
    for (before, low), (after, high) in pairwise(curve):
        if (before - recall) * (after - recall) < 0:
            found.append(low + (recall - before) / (after - before) * (high - low))
    return max(found, default=None)
