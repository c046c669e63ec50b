"""What a user gets: wheel, source distribution, editable install."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, and the wheel built from nothing but it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("proto_reg", "integrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def modules() -> set[str]:
    package = {f"proto_reg/{p.relative_to(ROOT / 'proto_reg')}" for p in (ROOT / "proto_reg").rglob("*.py")}
    adapters = {f"proto_reg/integrations/{p.name}" for p in (ROOT / "integrations").glob("*.py")}
    return package | adapters | {"proto_reg/py.typed"}


def test_wheel(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert {n for n in names if ".dist-info/" not in n} == modules()
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert {line.split()[1].split(">")[0] for line in required} == {"torch", "einops", "typing-extensions"}
    assert "License-Expression: MIT" in text


def test_source_distribution(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {"/".join(Path(name).parts[1:]) for name in archive.getnames()}
    for path in (ROOT / "proto_reg").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert {"integrations/__init__.py", "proto_reg/py.typed", "LICENSE", "README.md", "pyproject.toml"} <= names


def test_torch_is_no_build_requirement() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = next(line for line in text.splitlines() if line.startswith("requires ="))
    assert "torch" not in requires


@pytest.mark.parametrize("form", ["wheel", "editable"])
def test_installed_package(dist: Path, tmp_path: Path, form: str) -> None:
    """Installed into an environment of its own, that sees this one's torch; away from the repository."""
    environment = tmp_path / "env"
    venv.create(environment)
    python = environment / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip())
    # .pth files of the outer environment, such as an editable proto_reg, are not followed from here.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if form == "wheel":
        (target,) = map(str, dist.glob("*.whl"))
    else:
        (sdist,) = dist.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(tmp_path, filter="data")
        (target,) = (str(path) for path in tmp_path.glob("proto_reg-*") if path.is_dir())
    options = ["-e", target] if form == "editable" else [target]
    command = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--ignore-installed",
        *options,
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    code = (
        "import torch, proto_reg, proto_reg.integrations as adapters\n"
        "layer = proto_reg.PrototypicalRegularizer(8, 3)\n"
        "layer(torch.randn(16, 8))\n"
        "print(proto_reg.__file__); print(adapters.__file__)"
    )
    result = subprocess.run([python, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    package, adapters = (Path(line).resolve() for line in result.stdout.split())
    home = Path(target).resolve() if form == "editable" else site.resolve()
    assert home in package.parents
    assert adapters.parent.name == "integrations"
    assert home in adapters.parents
