"""The package that a user gets: the wheel, the source distribution and the editable install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import proto_reg
from proto_reg.kernels import build

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, and the wheel that is built from it alone."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("proto_reg", "integrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "lib", "integrations"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def modules() -> set[str]:
    package = {f"proto_reg/{p.relative_to(ROOT / 'proto_reg')}" for p in (ROOT / "proto_reg").rglob("*.py")}
    adapters = {f"proto_reg/integrations/{p.name}" for p in (ROOT / "integrations").glob("*.py")}
    sources = {f"proto_reg/csrc/{path.name}" for path in build.CSRC.iterdir() if path.suffix in build.SUFFIXES}
    return package | adapters | sources | {"proto_reg/py.typed"}


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_package_page_is_the_readme_without_links_into_the_source(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        header, _, page = archive.read(metadata).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in header
    readme = (ROOT / "README.md").read_text()
    code = r"```.*?```"
    assert re.findall(code, page, flags=re.DOTALL) == re.findall(code, readme, flags=re.DOTALL)
    prose = re.sub(code, "", page, flags=re.DOTALL)
    links = re.findall(r"\]\(([^)]*)\)", prose)
    assert [link for link in links if not link.startswith("http")] == []
    pictures = re.findall(r"!\[([^\]]*)\]", readme)
    assert pictures
    for picture in pictures:
        assert f"*Picture in the source: {picture}.*" in page
    assert len(prose.split()) > 0.9 * len(re.sub(code, "", readme, flags=re.DOTALL).split())


def test_make_has_the_commands_of_the_pages() -> None:
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pages = "".join(path.read_text() for path in paths)
    lines = (ROOT / "Makefile").read_text().splitlines()
    commands = [line.strip() for line in lines if line.startswith("\t") and not line.startswith("\t@")]
    assert len(commands) > 10
    assert [command for command in commands if command not in pages] == []


def test_the_citation_has_the_packages_version() -> None:
    assert f"\nversion: {proto_reg.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_source_distribution(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {"/".join(Path(name).parts[1:]) for name in archive.getnames()}
    for path in [*(ROOT / "proto_reg").rglob("*.py"), *build.CSRC.iterdir()]:
        assert str(path.relative_to(ROOT)) in names
    others = {"integrations/__init__.py", "proto_reg/py.typed", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert others <= names


def test_torch_is_no_build_requirement() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = next(line for line in text.splitlines() if line.startswith("requires ="))
    assert "torch" not in requires


def optional_dependencies() -> dict[str, list[str]]:
    """The extras of pyproject.toml."""
    if sys.version_info < (3, 11):
        pytest.skip("tomllib")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_floors_are_the_lower_bounds_of_the_extras_and_the_comparison() -> None:
    extras = optional_dependencies()
    users = [line for extra, lines in extras.items() if extra not in ("test", "bench", "docs") for line in lines]
    comparison = (ROOT / "examples" / "paper" / "requirements.txt").read_text().splitlines()
    users += [line for line in comparison if not line.startswith("#")]
    bounds = {}
    for requirement in map(Requirement, users):
        if requirement.name != "proto_reg":
            bounds[requirement.name] = next(s.version for s in requirement.specifier if s.operator == ">=")
    lines = (ROOT / "tests" / "floors.txt").read_text().splitlines()[1:]
    floors = dict(line.split("==") for line in lines)
    assert floors.pop("einops") == "0.8.1"  # the extra vq needs this; the library itself needs 0.8.0
    assert floors.pop("peft") in next(line for line in extras["test"] if line.startswith("peft"))
    assert floors == bounds


def test_all_has_every_stack_but_scvi() -> None:
    extras = optional_dependencies()
    (line,) = extras["all"]
    (every,) = re.findall(r"^proto_reg\[(.*)\]$", line)
    # The extra "examples" contains metrics and plots.
    assert set(every.split(",")) | {"metrics", "plots"} == set(extras) - {"all", "bench", "docs", "scvi", "test"}


@pytest.fixture(scope="module")
def tree(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, with kernels that compile in a moment."""
    if reason := build.obstacle("cpu"):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("tree")
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    for name in build.SOURCES["cpu"]:
        (root / "proto_reg" / "csrc" / name).write_text("")
    return root


def wheel_of(tree: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(tree)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.slow
def test_a_wheel_with_kernels_is_for_this_platform_and_any_python(tree: Path, tmp_path: Path) -> None:
    result = wheel_of(tree, tmp_path, PROTO_REG_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform_tag}.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import proto_reg; from proto_reg.kernels import build; print(proto_reg.__file__, build.find('cpu'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PROTO_REG_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path)
    package, library = map(Path, found.stdout.split())
    assert package.parents[1] == tmp_path / "site"
    assert library.parent == package.parent / "kernels" / "lib"
    assert [path.name for path in library.parent.iterdir()] == [library.name]

    # The same tree without the variable. setuptools keeps its build folder, but the wheel is still pure.
    assert wheel_of(tree, tmp_path / "pure", PROTO_REG_BUILD="").returncode == 0
    (pure,) = (tmp_path / "pure").glob("*-py3-none-any.whl")
    with zipfile.ZipFile(pure) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.slow
def test_kernels_asked_for_where_torch_is_missing(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    result = wheel_of(tree, tmp_path, PROTO_REG_BUILD="cpu", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "pip install --no-build-isolation" in result.stdout + result.stderr
    wrong = wheel_of(tree, tmp_path, PROTO_REG_BUILD="gpu")
    assert "PROTO_REG_BUILD: expected cpu, cuda or all, got 'gpu'" in wrong.stdout + wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("form", ["wheel", "editable"])
def test_installed_package(dist: Path, tmp_path: Path, form: str) -> None:
    """The package is in a new environment that sees this one's torch. The test runs outside of the repository."""
    environment = tmp_path / "env"
    venv.create(environment)
    python = environment / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip())
    # Python does not follow the .pth files of the outer environment, such as that of an editable proto_reg.
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
    if form == "editable":  # a plain path, as type checkers need, and the modules below it under their own names
        lines = [line for path in site.glob("*proto_reg*.pth") for line in path.read_text().splitlines()]
        assert [Path(line).resolve() for line in lines] == [home]
        assert (home / "proto_reg" / "integrations" / "lightning.py").is_file()
