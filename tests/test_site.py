"""The site builds without a warning, has every public name, and its notebooks run."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import proto_reg
from proto_reg import functional, plots

ROOT = Path(__file__).resolve().parents[1]
API = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md")))
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
NEEDS = {"cells": "scvi"}


def test_the_api_has_every_public_name() -> None:
    listed = set(re.findall(r"^::: (\S+)$", API, flags=re.MULTILINE))
    drawn = [
        name for name, value in inspect.getmembers(plots, inspect.isfunction) if value.__module__ == plots.__name__
    ]
    expected = {f"proto_reg.{name}" for name in proto_reg.__all__ if name != "functional"}
    expected |= {f"proto_reg.functional.{name}" for name in functional.__all__}
    expected |= {f"proto_reg.plots.{name}" for name in drawn if not name.startswith("_")}
    integrations = {path.stem for path in (ROOT / "integrations").glob("*.py")} - {"__init__"}
    expected |= {f"proto_reg.integrations.{name}" for name in integrations}
    assert listed == expected


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    start = (tmp_path / "site" / "start" / "index.html").read_text(encoding="utf-8")
    assert "Drop the KL term" in start
    assert (tmp_path / "site" / "files" / "examples" / "diffusers_vae.py").exists()
    assert "expected a non-empty tensor" in (tmp_path / "site" / "errors" / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On MNIST if the environment variable MNIST names its folder, else on the digits."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip(NEEDS.get(path.stem, "torch"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures
