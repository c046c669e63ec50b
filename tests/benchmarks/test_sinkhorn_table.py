"""The table of Sinkhorn's peers refuses wrong methods, times right ones, and needs no peer."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import sinkhorn_race as race
import torch
from sinkhorn_race import Contender

from proto_reg import _bench, _peers

CPU = torch.device("cpu")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch):
    """The program, as if no peer were installed."""
    for name in ("ot", "geomloss", "jax", "lightly"):
        monkeypatch.setitem(sys.modules, name, None)
    import sinkhorn_table

    return sinkhorn_table


def compete(entered: list[Contender], expected: torch.Tensor, **options: float) -> dict[str, race.Result]:
    error = partial(race.largest_error, expected=expected)
    return {result.name: result for result in race.compete(entered, error, CPU, seconds=0.01, **options)}


def test_swav_is_the_iterate_of_the_definition() -> None:
    scores = _bench.cosine_scores(40, 7).double()
    torch.testing.assert_close(race.swav(scores), _bench.reference(scores), atol=1e-12, rtol=1e-12)


def test_what_is_wrong_is_not_timed() -> None:
    scores = _bench.cosine_scores(16, 5)
    expected = _bench.reference(scores)
    right = expected.float()

    def broken() -> torch.Tensor:
        raise RuntimeError("no memory\nand a long story")

    results = compete(
        [
            Contender("right", right.clone),
            Contender("off", lambda: right + 1e-3),
            Contender("nearly", lambda: right + 1e-5, bound=_bench.BOUND),
            Contender("nan", lambda: right * torch.nan),
            Contender("one nan", lambda: torch.where(right == right.max(), torch.nan, right)),
            Contender("other shape", lambda: right[:, :2]),
            Contender("broken", broken),
            Contender("floor", scores.clone, None),
        ],
        expected,
    )
    timed = {name for name, result in results.items() if not math.isnan(result.seconds)}
    assert timed == {"right", "floor"}
    assert {name for name, result in results.items() if not result.note} == timed
    assert results["off"].note.startswith("wrong: error 1.0e-03")
    assert results["nan"].note == results["one nan"].note == "wrong: NaN"
    assert results["broken"].note == "fails: RuntimeError: no memory"
    assert len(results) == 8


def test_an_error_without_a_message_is_named() -> None:
    def broken() -> torch.Tensor:
        raise AssertionError

    assert compete([Contender("broken", broken)], torch.zeros(1, 1))["broken"].note.startswith("fails: AssertionError")


def test_slow_calls_are_not_repeated() -> None:
    calls = []

    def slow() -> torch.Tensor:
        calls.append(time.sleep(0.02))
        return torch.zeros(1, 1)

    result = compete([Contender("slow", slow)], torch.zeros(1, 1), limit=0.01)["slow"]
    assert result.note.startswith("skipped")
    assert len(calls) == 1


def test_times_are_those_of_a_call() -> None:
    codes = torch.zeros(1, 1)

    def sleep(seconds: float) -> torch.Tensor:
        time.sleep(seconds)
        return codes

    entered = [Contender(str(seconds), partial(sleep, seconds)) for seconds in (0.004, 0.016)]
    results = compete(entered, codes)
    assert 0.004 <= results["0.004"].seconds < 0.016 <= results["0.016"].seconds


def test_every_backend_that_runs_takes_part() -> None:
    names = [contender.name for contender in race.contenders(_bench.cosine_scores(8, 3))]
    assert names[:2] == [race.COPY, race.SWAV]
    assert names[2:] == [f"proto_reg {name}" for name in _bench.usable_backends(CPU)]
    assert "proto_reg torch" in names


def test_full_form_without_any_peer(full, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ["--seconds", "0.01", "--threads", str(torch.get_num_threads()), "--device", "cpu", "--fresh-memory"]
    files = ["--markdown", str(tmp_path / "table.md"), "--plot", str(tmp_path / "table.png")]
    assert full.main(["--shapes", "64x5", "32x7", *options, *files]) == 0
    printed, written = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    for text in (printed, written):
        assert "### 64 x 5" in text
        assert "| DINOv2 " in text
        assert "POT sinkhorn_log: not installed" in text
        assert "pip install --no-deps lightly" in text
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_hard_scores_find_out_swav_and_not_us(full) -> None:
    from sinkhorn_robustness import hazards

    rows = [line.split("|")[1:-1] for line in full.robustness_table(CPU).splitlines()]
    cells = {row[0].strip(): dict(zip(hazards(), map(str.strip, row[1:]), strict=True)) for row in rows}
    ours = cells["proto_reg torch"]
    assert {name for name, cell in ours.items() if cell != "ok"} == {"one NaN", "empty batch"}
    assert (ours["one NaN"], ours["empty batch"]) == ("all NaN", "raises ValueError")
    assert cells["proto_reg, nan_policy='isolate'"]["one NaN"] == "ok"
    assert cells[race.SWAV]["dots <= 300"] == cells[race.SWAV]["fp16, cosine to .9"] == "NaN"


def test_targets_are_judged_on_one_thread(full) -> None:
    results = [
        race.Result(race.SWAV, 1.0),
        race.Result(race.COPY, 0.05),
        race.Result("proto_reg cpu", 0.3),
        race.Result("proto_reg cpu, out=", 0.17),
        race.Result("proto_reg torch", note="wrong: NaN"),
    ]
    arguments = full.parse(["--threads", "1", "--device", "cpu"])
    verdicts = {row[0]: row[-1] for row in full.judged(results, (2048, 3000), arguments)}
    assert verdicts["proto_reg cpu"] == "<= 0.25 MISSED"
    assert verdicts["proto_reg cpu, out="] == "<= 0.25 met, <= 3.50 copies met"
    assert verdicts["proto_reg torch"] == "<= 0.75 MISSED"
    assert verdicts[race.SWAV] == ""
    two = full.parse(["--threads", "2", "--device", "cpu"])
    assert {row[-1] for row in full.judged(results, (2048, 3000), two)} == {""}


def test_loss_is_judged_by_its_gradient_too(full) -> None:
    scores = _bench.cosine_scores(32, 6)
    error = full._loss_error(scores)
    loss, gradient = full._differentiate(full._eager_loss, scores.requires_grad_())
    assert error((loss, gradient)) <= 1e-6
    assert error((loss, gradient * 1.01)) > 1e-4
    assert error((loss * 1.01, gradient)) > 1e-3
    assert math.isnan(error((loss * torch.nan, gradient)))
    assert math.isnan(error((loss, gradient * torch.nan)))


def test_the_table_of_shapes_times_what_is_right(cpu_library: Path) -> None:
    import sinkhorn_shapes

    scores = torch.randn(20, 4, 5)
    right = sinkhorn_shapes.row("right", (scores, 0.5, 3), seconds=0.001)
    assert float(right[3]) > 0
    assert float(right[4]) < _bench.BOUND
    for peer in (_peers.swav, _peers.exp_once):
        torch.testing.assert_close(peer(scores.double(), 0.5, 3)[7], race.swav(scores[7].double(), 0.5, 3))
    spoilt = scores.masked_fill(torch.arange(5) == 2, torch.nan)
    for table in (sinkhorn_shapes.row, sinkhorn_shapes.gradient_row):
        assert table("wrong", (spoilt, 0.5, 3), seconds=0.001)[1] == _bench.WRONG
    right = sinkhorn_shapes.gradient_row("right", (scores, 0.5, 3), seconds=0.001)
    assert float(right[4]) > 0
    assert float(right[5]) < _bench.BOUND
