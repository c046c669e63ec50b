"""Every Python block of README.md and of docs/ runs, and prints the text that its page shows.

The blocks of a page run in order, in a namespace of their own. Every link between the pages has a target.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(python|diff)\n(.*?)```(?:\s*```text\n(.*?)```)?", flags=re.DOTALL)
BLOCKS = {str(page.relative_to(ROOT)): BLOCK.findall(page.read_text(encoding="utf-8")) for page in PAGES}
GENERATED = {"errors.md"}  # by docs/hooks.py
WITH_BLOCKS = [page for page, blocks in BLOCKS.items() if blocks]


def test_there_are_blocks() -> None:
    assert len(BLOCKS["README.md"]) >= 2
    assert len(WITH_BLOCKS) >= 7
    assert sum(len(blocks) for blocks in BLOCKS.values()) >= 20


def test_the_readme_is_one_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A second thread does not speed up such small batches. On a busy machine it makes them much slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.warm_up
@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_blocks_run_and_print_what_they_say(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "page"}
    for language, code, printed in BLOCKS[page]:
        code = applied(code) if language == "diff" else code
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, page, "exec"), namespace)
        if printed:
            assert shape_of(out.getvalue()) == shape_of(printed), out.getvalue()


def applied(diff: str) -> str:
    """The code after the change that ``diff`` shows."""
    lines = diff.splitlines()
    assert all(line[:1] in ("", " ", "+", "-") for line in lines)
    return "\n".join(line[1:] for line in lines if not line.startswith("-"))


def shape_of(text: str) -> str:
    """The text without its measured numbers. Digits differ between processors. Words and layout do not."""
    return re.sub(r"\s+", " ", re.sub(r"\d+\.\d+", "#", text)).strip()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]*)\)", prose) if not link.startswith("http")]
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists() or path in GENERATED, link
        assert not heading or heading in headings(target), link


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\(([a-z-]+\.md)\)", index))
    assert named == {page.name for page in PAGES} - {"README.md", "index.md"}


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes for ``page``."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
