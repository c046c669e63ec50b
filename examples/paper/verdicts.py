"""Which claims of the paper hold, and whether ours keeps its promises: rules, deciding numbers and outcomes.

The rules were written before the runs that they judge. A function takes the runs of one study: one data set, one
network and one number of epochs. Means are over seeds. Ratios are between runs of the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from .results import NAMES, PROTOTYPICAL, Mean, Run, base, data_name, mean_of, prototype_counts, ratio, value, written

HOLDS, FAILS, UNMEASURED = "holds", "does not hold", "not measured"
DIGITS = ("MNIST", "digits")


class Verdict(NamedTuple):
    claim: str
    statement: str
    outcome: str
    number: str  # the deciding one
    rule: str


def verdict(claim: str, statement: str, holds: bool | None, number: str, rule: str) -> Verdict:
    """A verdict. ``holds=None`` means that it was not measured."""
    return Verdict(claim, statement, {True: HOLDS, False: FAILS, None: UNMEASURED}[holds], number, rule)


def _ratios(runs: list[Run], method: str, counts: list[int], to: list[Run]) -> dict[int, Mean]:
    found = {K: ratio(base(runs, method, K), to, "test_mse") for K in counts}
    return {K: r for K, r in found.items() if r is not None}


def _listed(ratios: dict[int, Mean]) -> str:
    return ", ".join(f"K = {K}: {written(r, '.3f')}" for K, r in ratios.items())


def c1(runs: list[Run], method: str = "algorithm-1-paper") -> Verdict:
    statement = "With ten prototypes or more it reconstructs as well as the plain autoencoder."
    rule = "at every K >= 10: test MSE <= 1.05 of the autoencoder's"
    counts = [K for K in prototype_counts(runs, method) if K >= 10]
    ratios = _ratios(runs, method, counts, base(runs, "autoencoder"))
    if not ratios:
        return verdict("C1", statement, None, "no run with K >= 10 beside an autoencoder", rule)
    return verdict("C1", statement, all(r.mean <= 1.05 for r in ratios.values()), _listed(ratios), rule)


def c2(runs: list[Run], method: str = "algorithm-1-paper") -> Verdict:
    statement = "With one prototype it reconstructs like VAE-KL and InfoVAE."
    rule = "at K = 1: test MSE between 0.8 and 1.25 of VAE-KL's, and of InfoVAE's"
    to = {name: ratio(base(runs, method, 1), base(runs, name), "test_mse") for name in ("vae", "infovae")}
    if any(r is None for r in to.values()):
        return verdict("C2", statement, None, "no run with K = 1 beside both", rule)
    number = ", ".join(f"of {NAMES[name]}'s: {written(r, '.3f')}" for name, r in to.items())
    return verdict("C2", statement, all(r is not None and 0.8 <= r.mean <= 1.25 for r in to.values()), number, rule)


def c3(runs: list[Run], method: str = "algorithm-1-paper") -> Verdict:
    statement = "Two prototypes are much better than one."
    rule = "test MSE at K = 2 <= 0.9 of that at K = 1"
    found = ratio(base(runs, method, 2), base(runs, method, 1), "test_mse")
    if found is None:
        return verdict("C3", statement, None, "no runs with K = 1 and K = 2", rule)
    return verdict("C3", statement, found.mean <= 0.9, f"{written(found, '.3f')}", rule)


def c4(runs: list[Run], method: str = "algorithm-1-paper") -> Verdict:
    statement = "More than ten prototypes add nothing to reconstruction."
    rule = "at every K > 10: test MSE >= 0.98 of that at K = 10"
    counts = [K for K in prototype_counts(runs, method) if K > 10]
    ratios = _ratios(runs, method, counts, base(runs, method, 10))
    if not ratios:
        return verdict("C4", statement, None, "no runs with K = 10 and above", rule)
    return verdict("C4", statement, all(r.mean >= 0.98 for r in ratios.values()), _listed(ratios), rule)


def c5(runs: list[Run], method: str = "algorithm-1-paper") -> Verdict:
    statement = "Ten prototypes miss the digits 4 and 5, twenty have a cluster for every digit, fifty separate them."
    rule = (
        "K = 10: neither 4 nor 5 is the majority of a cluster, in more than half of the seeds; K = 20: every digit is, "
        "in every seed; K = 50: purity on test data >= 0.95"
    )
    ten, twenty, fifty = (base(runs, method, K) for K in (10, 20, 50))
    if not (ten and twenty and fifty):
        return verdict("C5", statement, None, "no runs with K = 10, 20 and 50", rule)
    if data_name(ten[0]) not in DIGITS:
        return verdict("C5", statement, None, "about digits", rule)
    missing = [sum(value(run, f"covers_{digit}") == 0 for digit in (4, 5)) == 2 for run in ten]
    covered = [value(run, "classes_covered") == 10 for run in twenty]
    separated = mean_of(fifty, "purity")
    absent = ", ".join(
        f"seed {run['seed']} misses {' '.join(str(d) for d in range(10) if value(run, f'covers_{d}') == 0) or 'none'}"
        for run in ten
    )
    number = f"K = 10: {absent}; K = 20: {sum(covered)} of {len(covered)} seeds have all; K = 50: purity "
    number += written(separated)
    holds = sum(missing) > len(missing) / 2 and all(covered) and separated is not None and separated.mean >= 0.95
    return verdict("C5", statement, holds, number, rule)


def c6(runs: list[Run], method: str = "algorithm-1-paper") -> Verdict:
    statement = "Noise around a prototype keeps the class."
    rule = "K = 30, all prototypes counted: control >= 0.9 (the paper shows ten that were picked by hand)"
    found = mean_of(base(runs, method, 30), "control")
    if found is None:
        return verdict("C6", statement, None, "no runs with K = 30", rule)
    judge = mean_of(base(runs, method, 30), "judge_accuracy")
    number = f"{written(found)}; the classifier that judges is right on {written(judge)} of real test images"
    return verdict("C6", statement, found.mean >= 0.9, number, rule)


def bandwidths(runs: list[Run]) -> dict[float, list[Run]]:
    """The runs of the paper's Algorithm 1 with a given bandwidth sigma, grouped by it. sigma = 1 is one of them."""
    found: dict[float, list[Run]] = {}
    for run in runs:
        sigma = run["options"].get("sigma")
        if run["method"] == "algorithm-1-paper" and sigma is not None:
            found.setdefault(float(sigma), []).append(run)
    return dict(sorted(found.items()))


def inert(runs: list[Run]) -> Verdict:
    statement = (
        "With a bandwidth of 1 the regularising term is inert, which may be how the paper matched the autoencoder."
    )
    rule = (
        "sigma = 1: test MSE <= 1.05 of the autoencoder's while r^2/D, which the term should bring to 1, is not within "
        "0.8-1.2"
    )
    at_one = bandwidths(runs).get(1.0, [])
    error, radius = ratio(at_one, base(runs, "autoencoder"), "test_mse"), mean_of(at_one, "r2_per_dim")
    if error is None or radius is None:
        return verdict("sigma", statement, None, "no run with sigma = 1 beside an autoencoder", rule)
    number = f"test MSE {written(error)} of the autoencoder's, r^2/D {written(radius)}"
    return verdict("sigma", statement, error.mean <= 1.05 and not 0.8 <= radius.mean <= 1.2, number, rule)


CLAIMS: tuple[Callable[..., Verdict], ...] = (c1, c2, c3, c4, c5, c6)
CONTROL = {"MNIST": 0.95, "Fashion-MNIST": 0.85}
RIVALS = ("vae", "infovae", "wae", "wae-first", "wae-noise", "algorithm-1-paper", "algorithm-1")


def targets(runs: list[Run], method: str = "balanced", num_prototypes: int = 30) -> list[Verdict]:
    """The promises of ours, at K = 30."""
    ours = base(runs, method, num_prototypes)
    found = [
        _target("reconstruction", ratio(ours, base(runs, "autoencoder"), "test_mse"), -math.inf, 1.02, ".3f"),
        _target("regularity", mean_of(ours, "standardised_mmd"), -3, 3, ".2f"),
        _target("radius", mean_of(ours, "r2_per_dim"), 0.8, 1.2, ".3f"),
    ]
    name = data_name(runs[0]) if runs else ""
    if name in CONTROL:
        found.insert(1, _target("control", mean_of(ours, "control"), CONTROL[name], math.inf, ".3f"))
    return [*found, frontier(runs, ours)]


STATEMENTS = {
    "reconstruction": "Test MSE <= 1.02 of the plain autoencoder's.",
    "control": "Decoded samples around a prototype have its class.",
    "regularity": "The standardised MMD on held-out clusters is near its null.",
    "radius": "Clusters have the radius of N(v, I): r^2/D is near 1.",
}


def _target(name: str, found: Mean | None, low: float, high: float, spec: str) -> Verdict:
    rule = f"K = 30: at most {high:g}" if low == -math.inf else f"K = 30: between {low:g} and {high:g}"
    rule = f"K = 30: at least {low:g}" if high == math.inf else rule
    if found is None:
        return verdict(name, STATEMENTS[name], None, "no runs", rule)
    return verdict(name, STATEMENTS[name], low <= found.mean <= high, written(found, spec), rule)


def frontier(runs: list[Run], ours: list[Run]) -> Verdict:
    """Whether ours is ahead of each rival: its control must be better, and its reconstruction must not be worse."""
    statement = "Ahead of VAE-KL, InfoVAE, WAE-MMD and Algorithm 1 on the frontier."
    rule = (
        "K = 30, against each rival: test MSE <= 1.02 of its, and control higher. Rivals without prototypes sample "
        "around k-means centres, with the better of unit noise and their clusters' own spread"
    )
    standings = {name: standing(ours, base(runs, name, 30) or base(runs, name)) for name in RIVALS}
    measured = {name: s for name, s in standings.items() if s is not None}
    if not measured:
        return verdict("frontier", statement, None, "no rivals beside ours", rule)
    number = f"standardised MMD {_regularity(ours)}; " + "; ".join(
        f"{NAMES[name]}: MSE {mse:.3f} of its, control {gain:+.3f}, its MMD {mmd}"
        for name, (mse, gain, mmd) in measured.items()
    )
    absent = [NAMES[name] for name in RIVALS if name not in measured]
    if absent:
        number += f"; not measured: {', '.join(absent)}"
    holds = all(mse <= 1.02 and gain > 0 for mse, gain, _ in measured.values())
    # One rival that ours does not beat decides. The verdict holds only after all rivals are measured.
    return verdict("frontier", statement, None if holds and absent else holds, number, rule)


def standing(ours: list[Run], rival: list[Run]) -> tuple[float, float, str] | None:
    """The MSE divided by the rival's, the control minus the rival's, and the rival's standardised MMD, or None.

    It is None if one of the first two is missing.
    """
    error, mine, its = ratio(ours, rival, "test_mse"), control_of(ours), control_of(rival)
    if error is None or mine is None or its is None:
        return None
    return error.mean, mine.mean - its.mean, _regularity(rival)


def _regularity(runs: list[Run]) -> str:
    return written(mean_of(runs, "standardised_mmd"), ".1f")


def control_of(runs: list[Run]) -> Mean | None:
    """The control. Without own prototypes it is the better value: with unit noise, or with the clusters' own spread."""
    unit, fitted = mean_of(runs, "control"), mean_of(runs, "control_fitted")
    if unit is None or fitted is None or runs[0]["method"] in PROTOTYPICAL:
        return unit
    return max(unit, fitted)
