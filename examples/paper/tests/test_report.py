"""The verdicts on handmade runs, and the page from such runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.paper import results, rivals, verdicts
from examples.paper.__main__ import RESULTS, main
from examples.paper.report import build
from examples.paper.verdicts import FAILS, HOLDS, UNMEASURED

Run = dict[str, Any]
OPTIONS = {"algorithm-1-paper": {}, "algorithm-1": {"preset": "ours"}}


def a_run(method: str, K: int | None = None, seed: int = 0, data: str = "MNIST", **metrics: float) -> Run:
    """A run in the form of the program's records."""
    options = dict(OPTIONS.get(method, {})) | ({"num_prototypes": K} if K else {})
    return {
        "config": "handmade",
        "split": "test",
        "label": results.NAMES.get(method, method) + (f", K = {K}" if K else ""),
        "seed": seed,
        "data": data,
        "model": "conv-32",
        "method": "algorithm1" if method.startswith("algorithm") else method,
        "options": options,
        "num_prototypes": K,
        "epochs": 3,
        "status": "done",
        "error": None,
        "history": [{"epoch": e, "train_mse": 0.03 / e, "test_mse": 0.031 / e} for e in (1, 2, 3)],
        "metrics": {"test_mse": 0.01, "standardised_mmd": 5.0, "judge_accuracy": 0.99} | metrics,
        "step_ms": 12.5,
        "parameters": 1000,
        "seconds": 1800.0,
        "versions": {"torch": "2.13.0", "device": "cpu"},
        "arrays": None,
    }


def read(*runs: Run) -> list[Run]:
    return [results.named(run) for run in runs]


def seeds(method: str, K: int | None, *errors: float, **metrics: float) -> list[Run]:
    return [a_run(method, K, seed, test_mse=error, **metrics) for seed, error in enumerate(errors)]


def test_methods_are_told_apart() -> None:
    runs = read(
        a_run("vae") | {"options": {"beta": 4}},
        a_run("vae") | {"options": {"beta": 1}},
        a_run("algorithm-1-paper", 10),
        a_run("algorithm-1", 10),
    )
    assert [run["method"] for run in runs] == ["beta-vae", "vae", "algorithm-1-paper", "algorithm-1"]
    assert [run["num_prototypes"] for run in runs] == [None, None, 10, 10]


def test_a_sweep_is_not_the_base() -> None:
    plain = [a_run("algorithm-1-paper", K) for K in (10, 30)]
    swept = [plain[1] | {"label": f"s {s}", "options": {"num_prototypes": 30, "sigma": s}} for s in (1, 2, 4)]
    runs = read(*swept, *plain)
    assert results.base(runs, "algorithm-1-paper", 30) == [runs[-1]]
    assert results.prototype_counts(runs, "algorithm-1-paper") == [10, 30]
    assert list(verdicts.bandwidths(runs)) == [1.0, 2.0, 4.0]


def test_means_say_what_they_are_of() -> None:
    runs = read(*seeds("balanced", 30, 0.01, 0.02, 0.03, control=0.9))
    assert results.mean_of(runs, "test_mse") == results.Mean(pytest.approx(0.02), pytest.approx(0.01), 3, 3)
    assert results.mean_of(runs, "purity") is None
    assert results.written(results.mean_of(runs, "test_mse")) == "0.020 ± 0.010"
    assert results.written(results.mean_of(runs, "control")) == "0.900"
    assert results.written(None) == "–"
    del runs[1]["metrics"]["control"]
    assert results.written(results.mean_of(runs, "control")) == "0.900 (2 of 3)"
    runs[0]["metrics"]["control"] = math.nan
    assert results.written(results.mean_of(runs, "control")) == "NaN"


def test_ratios_are_between_runs_of_a_seed() -> None:
    above, below = seeds("balanced", 30, 0.02, 0.06), seeds("autoencoder", None, 0.01, 0.02)
    assert results.ratio(above, below, "test_mse") == results.Mean(2.5, pytest.approx(0.5**0.5), 2, 2)
    assert results.ratio(above, below[:1], "test_mse") == (2.0, pytest.approx(math.nan, nan_ok=True), 1, 2)
    assert results.ratio(above, [], "test_mse") is None


def test_c1_asks_for_every_k_from_ten_up() -> None:
    plain, five = a_run("autoencoder", test_mse=0.01), a_run("algorithm-1-paper", 5, test_mse=0.09)
    near = [a_run("algorithm-1-paper", K, test_mse=0.0104) for K in (10, 30)]
    assert verdicts.c1(read(plain, five, *near)).outcome == HOLDS
    far = a_run("algorithm-1-paper", 50, test_mse=0.011)
    found = verdicts.c1(read(plain, five, *near, far))
    assert found.outcome == FAILS
    assert "K = 50: 1.100" in found.number
    assert verdicts.c1(read(plain, five)).outcome == verdicts.c1(read(*near)).outcome == UNMEASURED
    assert verdicts.c1(read(plain, *near), "balanced").outcome == UNMEASURED


@pytest.mark.parametrize(("vae", "outcome"), [(0.02, HOLDS), (0.03, FAILS)])
def test_c2_asks_for_both_baselines(vae: float, outcome: str) -> None:
    one, info = a_run("algorithm-1-paper", 1, test_mse=0.02), a_run("infovae", test_mse=0.022)
    assert verdicts.c2(read(one, info, a_run("vae", test_mse=vae))).outcome == outcome
    assert verdicts.c2(read(one, info)).outcome == UNMEASURED


@pytest.mark.parametrize(("two", "outcome"), [(0.017, HOLDS), (0.019, FAILS)])
def test_c3_compares_two_with_one(two: float, outcome: str) -> None:
    runs = read(a_run("algorithm-1-paper", 1, test_mse=0.02), a_run("algorithm-1-paper", 2, test_mse=two))
    assert verdicts.c3(runs).outcome == outcome
    assert verdicts.c3(runs[:1]).outcome == UNMEASURED


@pytest.mark.parametrize(("fifty", "outcome"), [(0.0099, HOLDS), (0.012, HOLDS), (0.0097, FAILS)])
def test_c4_fails_where_more_prototypes_help(fifty: float, outcome: str) -> None:
    runs = [a_run("algorithm-1-paper", K, test_mse=error) for K, error in ((10, 0.01), (30, 0.01), (50, fifty))]
    assert verdicts.c4(read(*runs)).outcome == outcome
    assert verdicts.c4(read(*runs[1:])).outcome == UNMEASURED


def covering(K: int, *missing: int, seed: int = 0, data: str = "MNIST", **metrics: float) -> Run:
    covers = {f"covers_{c}": float(c not in missing) for c in range(10)}
    return a_run("algorithm-1-paper", K, seed, data, classes_covered=10.0 - len(missing), **covers, **metrics)


def test_c5_has_three_parts() -> None:
    ten, twenty, fifty = covering(10, 4, 5), covering(20), covering(50, purity=0.96)
    assert verdicts.c5(read(ten, twenty, fifty)).outcome == HOLDS
    assert verdicts.c5(read(covering(10, 4), twenty, fifty)).outcome == FAILS
    assert verdicts.c5(read(ten, covering(20, 9), fifty)).outcome == FAILS
    assert verdicts.c5(read(ten, twenty, covering(50, purity=0.9))).outcome == FAILS
    # Half of the seeds are not more than half.
    found = verdicts.c5(read(ten, covering(10, 2, seed=1), twenty, fifty))
    assert found.outcome == FAILS
    assert "seed 0 misses 4 5, seed 1 misses 2" in found.number
    clothes = [run | {"data": "Fashion-MNIST"} for run in (ten, twenty, fifty)]
    assert verdicts.c5(read(*clothes)).outcome == UNMEASURED
    assert verdicts.c5(read(ten, twenty)).outcome == UNMEASURED


@pytest.mark.parametrize(("control", "outcome"), [(0.9, HOLDS), (0.89, FAILS)])
def test_c6_counts_all_prototypes_of_thirty(control: float, outcome: str) -> None:
    assert verdicts.c6(read(a_run("algorithm-1-paper", 30, control=control))).outcome == outcome
    assert verdicts.c6(read(a_run("algorithm-1-paper", 10, control=control))).outcome == UNMEASURED


@pytest.mark.parametrize(
    ("error", "radius", "outcome"), [(0.0102, 9.0, HOLDS), (0.0102, 1.0, FAILS), (0.02, 9.0, FAILS)]
)
def test_sigma_one_is_inert_where_error_is_low_and_radius_wrong(error: float, radius: float, outcome: str) -> None:
    swept = a_run("algorithm-1-paper", 30, test_mse=error, r2_per_dim=radius)
    runs = read(a_run("autoencoder"), swept | {"options": {"num_prototypes": 30, "sigma": 1}})
    assert verdicts.inert(runs).outcome == outcome
    assert verdicts.inert(runs[:1]).outcome == UNMEASURED


def test_targets_at_thirty_prototypes() -> None:
    plain = a_run("autoencoder", test_mse=0.01)
    good = a_run("balanced", 30, test_mse=0.0102, control=0.95, standardised_mmd=2.0, r2_per_dim=1.1)
    found = {v.claim: v.outcome for v in verdicts.targets(read(plain, good))}
    assert found == {
        "reconstruction": HOLDS,
        "control": HOLDS,
        "regularity": HOLDS,
        "radius": HOLDS,
        "frontier": UNMEASURED,
    }
    bad = a_run("balanced", 30, test_mse=0.0103, control=0.94, standardised_mmd=-4.0, r2_per_dim=1.3)
    found = {v.claim: v.outcome for v in verdicts.targets(read(plain, bad))}
    assert set(found.values()) == {FAILS, UNMEASURED}
    fashion = [run | {"data": "Fashion-MNIST"} for run in (plain, bad)]
    assert {v.claim: v.outcome for v in verdicts.targets(read(*fashion))}["control"] == HOLDS
    assert "control" not in {v.claim for v in verdicts.targets(read(plain | {"data": "digits"}))}


WITHOUT_PROTOTYPES = ("vae", "infovae", "wae", "wae-first", "wae-noise")


def paper_rivals(**changed: float) -> list[Run]:
    worse = {"test_mse": 0.01, "control": 0.7, "control_fitted": 0.8} | changed
    return [
        *(a_run(method, **worse) for method in WITHOUT_PROTOTYPES),
        *(a_run(method, 30, **worse) for method in ("algorithm-1-paper", "algorithm-1")),
    ]


def test_the_frontier_takes_every_rival() -> None:
    ours = a_run("balanced", 30, test_mse=0.01, control=0.85)

    def outcome(runs: list[Run]) -> str:
        return verdicts.frontier(read(*runs), read(ours)).outcome

    assert outcome(paper_rivals()) == HOLDS
    assert outcome(paper_rivals()[1:]) == UNMEASURED  # one is missing
    assert outcome(paper_rivals(test_mse=0.009)) == FAILS
    # For rivals without prototypes the better noise counts. For Algorithm 1 and ours it is N(v, I).
    assert outcome(paper_rivals(control_fitted=0.9)) == FAILS
    others = len(WITHOUT_PROTOTYPES)
    assert outcome([*paper_rivals()[:others], *paper_rivals(control_fitted=0.9)[others:]]) == HOLDS
    # A rival that ours does not beat decides, even if others are missing.
    assert outcome(paper_rivals(control=0.9)[1:]) == FAILS


def with_prior(method: str, seed: int = 0, data: str = "MNIST", **metrics: float) -> Run:
    """A run that samples from its best prior: ``method`` is one of ``rivals``."""
    base, prior = method.rsplit("-", 1)
    curve = {"recall@0.5": 0.5, "control@0.5": 0.95, "recall@1": 0.8, "control@1": 0.85}
    values = {"test_mse": 0.01, "fid": 8.0, "recall": 0.8, "control": 0.85, "ceiling_fid": 3.0, "fid_real": 2.0}
    run = a_run(base, 30, seed, data, **(curve | values | metrics))
    return run | {"label": results.NAMES[method], "options": {"num_prototypes": 30, "prior": prior}}


def outcomes(*runs: Run) -> dict[str, str]:
    return {goal.name: goal.outcome for goal in rivals.goals(read(*runs))}


GOOD = {"fid": 8.9, "recall": 0.78, "test_mse": 0.0089, "control@1": 0.89}


def test_a_fitted_prior_is_a_method_of_its_own() -> None:
    runs = read(a_run("balanced", 30), with_prior("balanced-clusters"), a_run("autoencoder"), with_prior("vae-gmm"))
    assert [run["method"] for run in runs] == ["balanced", "balanced-clusters", "autoencoder", "vae-gmm"]
    assert results.base(runs, "balanced", 30) == [runs[0]]
    assert [results.fitted(run) for run in runs] == [False, True, False, True]


def test_goals_against_the_best_rival() -> None:
    others = [with_prior(method, fid=20.0, recall=0.95) for method in rivals.RIVALS[1:]]
    best = with_prior("kmeans-clusters")
    assert rivals.best_rival(read(*others, best)) == "kmeans-clusters"
    good = with_prior("balanced-clusters", **GOOD)
    assert set(outcomes(good, best, *others).values()) == {rivals.REACHED}
    for name, worse in (
        ("FID", {"fid": 9.1}),
        ("recall", {"recall": 0.77}),
        ("control", {"control@1": 0.87}),
        ("control", {"recall@1": 0.79}),  # it never has the rival's recall
        ("error", {"test_mse": 0.0091}),
    ):
        found = outcomes(with_prior("balanced-clusters", **(GOOD | worse)), best, *others)
        assert {goal for goal, outcome in found.items() if outcome == rivals.MISSED} == {name}
    assert set(outcomes(best, *others).values()) == set(outcomes(good).values()) == {rivals.UNMEASURED}


def test_goals_wait_for_every_rival_unless_one_decides() -> None:
    best, bad = with_prior("autoencoder-gmm"), with_prior("balanced-clusters", **(GOOD | {"fid": 9.1}))
    assert outcomes(bad, best) == {
        "FID": rivals.MISSED,
        "recall": rivals.UNMEASURED,
        "control": rivals.UNMEASURED,
        "error": rivals.REACHED,
    }


def test_the_goal_for_the_error_depends_on_the_data() -> None:
    for error, data, outcome in (
        (0.0095, "MNIST", rivals.MISSED),
        (0.0095, "digits", rivals.REACHED),
        (0.0103, "digits", rivals.MISSED),
    ):
        ours = with_prior("balanced-clusters", data=data, test_mse=error)
        assert outcomes(ours, with_prior("autoencoder-gmm", data=data))["error"] == outcome


def test_control_at_equal_recall_is_read_off_the_curve() -> None:
    curve = [(0.2, 0.9), (0.4, 0.8), (0.8, 0.6), (0.7, 0.5)]
    assert rivals.control_at(curve, 0.4) == 0.8
    assert rivals.control_at(curve, 0.6) == pytest.approx(0.7)
    assert rivals.control_at(curve, 0.1) == 0.9  # less spread has more recall than this
    assert rivals.control_at(curve, 0.9) is None
    runs = read(*(with_prior("vae-gmm", seed, **{"control@1": c}) for seed, c in enumerate((0.8, 0.9))))
    assert rivals.frontier(runs) == [(0.5, 0.95), (0.8, pytest.approx(0.85))]


def test_the_first_screen_says_what_is_reached_and_what_is_not(tmp_path: Path) -> None:
    runs = [with_prior(m, s, ceiling_recall=0.9) for m in rivals.RIVALS for s in (0, 1)]
    auroc = {"auroc: Fashion-MNIST": 0.98, "auroc, N(v, I): Fashion-MNIST": 0.93}
    runs += [with_prior("balanced-clusters", seed, **(GOOD | auroc | {"fid": 9.5})) for seed in (0, 1)]
    runs += [with_prior(rivals.AS_TRAINED, fid=11.0), a_run("balanced", 30, control=0.9), a_run("autoencoder")]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    page = build(tmp_path, tmp_path / "out").read_text()
    assert "Ours reaches 3 of 4 goals against its best rivals. It does not reach: FID on MNIST." in page
    assert "**not reached**: 9.5, the rival 8.0" in page
    assert page.index("Ours reaches") < page.index("## The paper's claims") < page.index("| C1 |")
    assert "| **ours** | 2 | 9.5 |" in page
    assert "| **ours as trained** | 1 | 11.0 |" in page  # beside the goals
    assert "| *ceiling of autoencoder* | 2 | 3.0 |" in page
    assert page.count("*ceiling of autoencoder*") == 1
    assert "| ours, N(v, I) around each prototype | 0.9300 |" in page
    assert "mnist-conv-32-3-spreads.png" in page
    paper = page.split("### Reconstruction and cost")[1].split("### What ours promises")[0]
    assert "GMM" not in paper.split("All on images")[0]


def with_arrays(run: Run, folder: Path, shape: tuple[int, int, int], phases: list[str]) -> Run:
    """The run with arrays in the form of the evaluation."""
    rng, K = np.random.default_rng(0), run["num_prototypes"] or 30
    name = f"arrays/{run['label']}-{run['data']}-s{run['seed']}.npz".replace(" ", "-")
    (folder / "arrays").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / name,
        prototypes=rng.integers(0, 256, (K, *shape), np.uint8),
        majority=np.arange(K) % 10,
        noise=rng.integers(0, 256, (K, 8, *shape), np.uint8),
        inputs=rng.integers(0, 256, (10, *shape), np.uint8),
        reconstructions=rng.integers(0, 256, (10, *shape), np.uint8),
        tsne=rng.normal(size=(50, 2)).astype(np.float16),
        tsne_prototypes=rng.normal(size=(K, 2)).astype(np.float16),
        tsne_labels=(np.arange(50) % 10).astype(np.uint8),
        trace=rng.random((12, len(phases)), np.float32) + 0.01,
        trace_steps=np.array(phases),
    )
    return run | {"arrays": name}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds of most methods on two data sets, with arrays of the first. One run failed. One has a metric of NaN."""
    runs = []
    for data, shape in (("MNIST", (1, 28, 28)), ("cifar10", (3, 32, 32))):
        for seed in (0, 1):
            some = [
                *(a_run(m, None, seed, data, control=0.7, r2_per_dim=1.0) for m in ("autoencoder", "vae", "infovae")),
                *(a_run("balanced", K, seed, data, control=0.9, r2_per_dim=1.0, acc=0.5) for K in (1, 10, 30)),
                *(a_run("algorithm-1-paper", K, seed, data, control=0.8, r2_per_dim=3.0) for K in (10, 30)),
            ]
            for sigma in (1, 8):
                swept = a_run("algorithm-1-paper", 30, seed, data, r2_per_dim=9.0)
                swept |= {"label": f"Algorithm 1, sigma = {sigma}", "options": {"num_prototypes": 30, "sigma": sigma}}
                some.append(swept)
            phases = {"algorithm1": ["before", "prototype", "mmd", "reconstruction"]}
            if seed == 0:
                some = [with_arrays(r, tmp_path, shape, phases.get(r["method"], ["before", "all"])) for r in some]
            runs += some
    failed = {"status": "failed", "error": "Traceback\nFloatingPointError: nan after epoch 3", "metrics": {}}
    runs[1] |= failed | {"arrays": None}
    runs[0]["metrics"]["control"] = math.nan
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    return tmp_path


def test_the_page(folder: Path, tmp_path: Path) -> None:
    page = build(folder, tmp_path / "out").read_text()
    first = page.splitlines()[0]
    assert first == "**Narrow models, not the paper's size (conv-32), trained on CPU: MNIST, CIFAR-10 (JPEG copy).**"
    assert "cifar10" not in page.replace("cifar-10", "")
    assert "CIFAR-10" not in page.replace("CIFAR-10 (JPEG copy)", "")
    assert "| VAE-KL | 1, 1 failed | 0.01000 |" in page
    assert "VAE-KL, seed 0: FloatingPointError: nan after epoch 3" in page
    assert "autoencoder, seed 0: finished, but control are not numbers" in page
    assert "| autoencoder | 2 | NaN |" in page  # in the table of synthesis; the other seed does not replace it
    assert "VaDE, K = 10 | ACC .9446 | Jiang et al. 2017" in page
    for claim in ("C1", "C2", "C3", "C4", "C5", "C6"):
        assert f"- **{claim}: " in page
    pictures = [line.split("](")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    for name in ("frontier", "figure-2", "figure-3", "figure-4-balanced", "figure-5", "figure-6", "limit-cycle"):
        for data in ("mnist-conv-32-3", "cifar-10-jpeg-copy-conv-32-3"):
            assert f"{data}-{name}.png" in pictures
    assert len(pictures) == len(set(pictures)) == len(list((tmp_path / "out").glob("*.png")))
    for picture in pictures:
        assert (tmp_path / "out" / picture).stat().st_size > 5_000


def test_the_page_is_built_from_json_alone_and_says_what_is_missing(folder: Path, tmp_path: Path, capsys) -> None:
    assert "Arrays of" not in build(folder, tmp_path / "whole").read_text()
    count = sum(results.done(run) and bool(run["arrays"]) for run in results.load(folder))
    for file in (folder / "arrays").iterdir():
        file.unlink()
    assert main(["report", "--results", str(folder), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    page = (tmp_path / "out" / "report.md").read_text()
    assert "frontier.png" in page
    assert "figure-6.png" in page
    assert "figure-2.png" not in page
    lines = [line for line in page.splitlines() if line.startswith("Arrays of")]
    assert len(lines) == 2
    assert sum(int(line.split()[2]) for line in lines) == count
    for line in lines:
        assert "Not drawn without them: figure-2, figure-3, figure-5, limit-cycle, figure-4-balanced" in line
        assert "`python -m examples.paper run --config handmade --out DIR` makes them" in line
        assert line in said
    # An existing picture stays, and the page says that it is old.
    kept = tmp_path / "out" / "mnist-conv-32-3-figure-2.png"
    kept.write_bytes(b"as it was")
    page = build(folder, tmp_path / "out").read_text()
    assert "(mnist-conv-32-3-figure-2.png)" in page
    assert "Kept as drawn before: figure-2." in page
    assert kept.read_bytes() == b"as it was"


def test_the_page_in_the_repository_is_what_its_records_give(tmp_path: Path) -> None:
    out = shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("work", "arrays"))
    page = (RESULTS / "report.md").read_text()
    assert build(out, out).read_text() == page
    linked = {line.split("](")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")}
    assert linked == {path.name for path in out.glob("*.png")}


def test_sizes_of_models_are_told_apart(tmp_path: Path) -> None:
    kinds = [("conv-256", "MNIST", "NVIDIA H100"), ("mlp-256", "digits", "cpu"), ("conv-32", "MNIST", "cpu")]
    runs = [
        a_run("autoencoder") | {"model": model, "data": data, "versions": {"device": device}}
        for model, data, device in kinds
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    page = build(tmp_path, tmp_path).read_text()
    assert page.splitlines()[0] == (
        "**Paper-size models (conv-256), trained on NVIDIA H100: MNIST; small MLPs (mlp-256), trained on CPU: digits; "
        "narrow models, not the paper's size (conv-32), trained on CPU: MNIST.**"
    )


def test_a_line_counts_once_and_the_later_one(tmp_path: Path) -> None:
    lines = [a_run("autoencoder", test_mse=error) for error in (0.02, 0.01)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in lines))
    assert [run["metrics"]["test_mse"] for run in results.load(tmp_path)] == [0.01]


def test_validation_and_test_do_not_mix() -> None:
    runs = read(a_run("autoencoder"), a_run("balanced", 30) | {"split": "validation"})
    assert [(study.split, len(some)) for study, some in results.studies(runs).items()] == [
        ("test", 1),
        ("validation", 1),
    ]


def test_errors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected runs.jsonl in .*, found none"):
        build(tmp_path, tmp_path)
    (tmp_path / "runs.jsonl").write_text('\n{"config": "x"}\n')
    with pytest.raises(ValueError, match="line 2: expected a run"):
        build(tmp_path, tmp_path)
    (tmp_path / "runs.jsonl").write_text("not json")
    with pytest.raises(ValueError, match="line 1: expected a run"):
        build(tmp_path, tmp_path)
