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
from proto_reg import _bench, _peers

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


def cells(printed: str) -> list[list[str]]:
    """The cells of the table, without its header."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert tuple(rows[0]) == _bench.HEADER
    return rows[2:]


def test_every_backend_that_runs_is_timed_beside_others(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert command_line.main(["bench", "--shapes", "64x5,48x6", "32X7", "--seconds", "0.01", "--device", "cpu"]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    names = [*_bench.usable_backends(CPU), "exp once", "SwAV's rule", *_peers.installed()]
    assert "torch" in names
    sizes = ("64 x 5", "48 x 6", "32 x 7")
    rows = cells(printed)
    assert [row[:3] for row in rows] == [[size, str(threads), name] for size in sizes for name in names]
    for row in rows:
        assert float(row[3]) > 0 or row[2] == "geomloss"  # which computes another iterate
        assert float(row[6]) <= (_bench.BOUND if row[2] in _bench.usable_backends(CPU) else _bench.PEER_BOUND)
    assert {row[4] for row in rows if row[2] == "torch"} == {"1.000"}


def test_without_a_gpu_nobody_is_told_to_move_scores_there(capsys: pytest.CaptureFixture[str]) -> None:
    command_line.main(["bench", "--shapes", "8x3", "--seconds", "0.01", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "scores.to(" not in printed
    told = "it needs --device cuda" if torch.cuda.is_available() else "PyTorch sees no GPU here"
    assert f"cuda did not run: {told}" in printed


@pytest.mark.parametrize("name", ["tiny", "attention", "moe", "matching"])
def test_named_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _bench.case(name, CPU)
    case = case._replace(scores=case.scores[:256])  # the whole takes long
    for backward in (False, True):
        field = _bench.contenders(CPU, backward=backward)
        assert {"torch", "exp once", "SwAV's rule"} <= set(field)
        rows = _bench.rows(case, 0.0, field, backward=backward)
        assert {"torch", "exp once", "SwAV's rule"} <= {row[2] for row in rows if row[3] not in ("wrong", "cannot")}
        assert not any(_bench.WRONG in row for row in rows)


def test_errors_of_codes_are_absolute_and_those_of_gradients_relative() -> None:
    case = _bench.case("400x200", CPU)
    for backward in (False, True):
        off = {"torch": _bench.Contender(lambda *arguments: _peers.swav(*arguments) * (1 + 1e-3), 1.0)}
        exact = _bench.task(_bench.reference, case, backward=backward)()
        error = float(_bench.rows(case, 0.0, off, backward=backward)[0][6])
        assert abs(error - (1e-3 if backward else 1e-3 * exact.max().item())) < 1e-4


def test_a_gradient_is_judged() -> None:
    case = _bench.case("40x6", CPU)
    half = {"torch": _bench.Contender(lambda *arguments: _peers.swav(*arguments) / 2, _bench.PEER_BOUND)}
    assert _bench.rows(case, 0.0, half, backward=True)[0][3] == _bench.WRONG
    constant = {"exp once": _bench.Contender(lambda *arguments: torch.ones(40, 6), _bench.PEER_BOUND)}
    row = _bench.rows(case, 0.0, constant, backward=True)[0]
    assert row[3] == _bench.CANNOT
    assert "does not require grad" in row[6]


def test_threads_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        command_line.main(["bench", "--shapes", "16x5", "--seconds", "0.01", "--device", "cpu", "--threads", "1,2"])
    finally:
        torch.set_num_threads(threads)
    assert {row[1] for row in cells(capsys.readouterr().out)} == {"1", "2"}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what a process had at most")
def test_memory_is_what_a_call_takes() -> None:
    taken = _bench.peak_memory(lambda: torch.ones(2**22).sum(), CPU)  # 16 MiB
    assert taken == "" or 15 < float(taken) < 40


@pytest.mark.parametrize("asked", ["baseline", "avx2", "avx512"])
def test_the_instruction_set_is_told(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROTO_REG_CPU_ISA", raising=False)
    widest = _bench.instruction_set()
    assert widest in ("baseline", "avx2", "avx512")
    assert f"kernels for {widest}," in _bench.environment(CPU)
    monkeypatch.setenv("PROTO_REG_CPU_ISA", asked)
    order = ["baseline", "avx2", "avx512"]
    least = order[min(order.index(widest), order.index(asked))]
    assert _bench.instruction_set() == f"{least} (PROTO_REG_CPU_ISA={asked})"


@pytest.mark.parametrize("error", [1e-5, float("nan")])
def test_wrong_codes_are_not_timed(monkeypatch: pytest.MonkeyPatch, capsys, error: float) -> None:
    right = _bench.sinkhorn
    monkeypatch.setattr(_bench, "usable_backends", lambda device: ["torch", "cpu"])
    monkeypatch.setattr(
        _bench, "sinkhorn", lambda *args, backend: right(*args, backend="torch") + (error if backend == "cpu" else 0)
    )
    assert command_line.main(["bench", "--shapes", "16x5", "--seconds", "0.01", "--device", "cpu"]) == 1
    torch_row, cpu_row, *_ = cells(capsys.readouterr().out)
    assert "wrong" not in torch_row
    assert cpu_row[2:5] == ["cpu", "wrong", ""]


@pytest.mark.parametrize("text", ["256", "0x3", "axb", "3x4x5", "tiny,huge"])
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
