"""Every Python block of the README runs, in order, in one namespace, and prints what the README says it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", README, flags=re.DOTALL)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.warm_up
@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
def test_blocks_run_and_print_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "readme"}
    for code, printed in BLOCKS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "README.md", "exec"), namespace)
        if printed:
            assert shape_of(out.getvalue()) == shape_of(printed), out.getvalue()


def shape_of(text: str) -> str:
    """The text with every measured number blanked: digits differ between processors, words and layout do not."""
    return re.sub(r"\s+", " ", re.sub(r"\d+\.\d+", "#", text)).strip()
