"""``python -m proto_reg bench`` compares with a correct reference and refuses wrong results."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import log_sinkhorn, swav_sinkhorn

from proto_reg import __main__ as command_line
from proto_reg import _bench

CPU = torch.device("cpu")


def test_reference_is_the_closed_form_after_one_iteration() -> None:
    # S / eps = log [[1, 3], [1, 1]]. With columns that sum to 1/2 this is [[1/4, 3/8], [1/4, 1/8]].
    # With rows that sum to 1 these are the codes below.
    scores = _bench.EPSILON * torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64).log()
    expected = torch.tensor([[2 / 5, 3 / 5], [2 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(_bench.reference(scores, num_iters=1), expected)


def test_reference_is_the_iterate_of_the_definition() -> None:
    scores = _bench.cosine_scores(40, 7).double()
    for judged in (_bench.reference(scores), swav_sinkhorn(scores, 0.05, 3)):
        torch.testing.assert_close(judged, log_sinkhorn(scores, 0.05, 3), atol=1e-12, rtol=1e-12)


def test_scores_are_cosines_and_the_same_every_time() -> None:
    scores = _bench.cosine_scores(300, 50)
    assert torch.equal(scores, _bench.cosine_scores(300, 50))
    assert 0.7 < scores.abs().max() <= 1


def test_medians_are_seconds_of_a_call() -> None:
    calls = {seconds: partial(time.sleep, float(seconds)) for seconds in ("0.004", "0.016")}
    medians = _bench.medians(calls, CPU, seconds=0.01)
    assert 0.004 <= medians["0.004"] < 0.016 <= medians["0.016"]


def test_table_lines_up() -> None:
    text = _bench.table(["", "ms"], [["a -", "1"], ["longer", "23.5"]])
    assert text.splitlines() == ["|        | ms   |", "|--------|------|", "| a -    | 1    |", "| longer | 23.5 |"]


def test_every_backend_that_runs_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert command_line.main(["bench", "--shapes", "64x5", "32X7", "--seconds", "0.01", "--device", "cpu"]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert rows[0] == ["scores", "backend", "ms", "x torch", "error"]
    names = _bench.usable_backends(CPU)
    assert "torch" in names
    assert [row[:2] for row in rows[2:]] == [[size, name] for size in ("64 x 5", "32 x 7") for name in names]
    for row in rows[2:]:
        assert float(row[2]) > 0
        assert float(row[4]) <= _bench.BOUND
    assert {row[3] for row in rows[2:] if row[1] == "torch"} == {"1.000"}
    assert "cuda did not run: " in printed


@pytest.mark.parametrize("error", [1e-5, float("nan")])
def test_wrong_codes_are_not_timed(monkeypatch: pytest.MonkeyPatch, capsys, error: float) -> None:
    right = _bench.sinkhorn
    monkeypatch.setattr(_bench, "usable_backends", lambda device: ["torch", "cpu"])
    monkeypatch.setattr(
        _bench, "sinkhorn", lambda *args, backend: right(*args, backend="torch") + (error if backend == "cpu" else 0)
    )
    assert command_line.main(["bench", "--shapes", "16x5", "--seconds", "0.01", "--device", "cpu"]) == 1
    torch_row, cpu_row = capsys.readouterr().out.split("| 16 x 5 |")[1:]
    assert "wrong" not in torch_row
    assert [cell.strip() for cell in cpu_row.split("|")[:3]] == ["cpu", "wrong", ""]


@pytest.mark.parametrize("text", ["256", "0x3", "axb", "3x4x5"])
def test_shapes_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["bench", "--shapes", text])
    assert "--shapes" in capsys.readouterr().err


def test_without_a_command_there_is_help() -> None:
    run = subprocess.run([sys.executable, "-m", "proto_reg"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: python -m proto_reg")
    for command in ("backends", "build", "bench"):
        assert f"\n    {command} " in run.stdout
