"""Puts compiled kernels into the wheel if PROTO_REG_BUILD=cpu|cuda|all asks for them, and makes the package's page.

Everything else is in pyproject.toml.

It needs the torch that the library will run with: PROTO_REG_BUILD=cpu pip install --no-build-isolation .
"""

import contextlib
import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # which --no-build-isolation leaves unchecked
    raise SystemExit(
        f"setuptools 77 or later is needed, this is {setuptools.__version__}. Run pip install -U setuptools."
    )

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent


def load_builder():
    """``proto_reg/kernels/build.py`` on its own: the package imports torch, an isolated build has none."""
    spec = importlib.util.spec_from_file_location("proto_reg_build", ROOT / "proto_reg" / "kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wanted() -> tuple[str, ...]:
    """The backends that PROTO_REG_BUILD names."""
    choice = os.environ.get("PROTO_REG_BUILD", "")
    choices = {"": (), "cpu": ("cpu",), "cuda": ("cuda",), "all": ("cpu", "cuda")}
    if choice not in choices:
        raise SystemExit(f"PROTO_REG_BUILD: expected cpu, cuda or all, got {choice!r}. Pick one, or unset it.")
    return choices[choice]


def page() -> str:
    """README.md for a package index, which has no other files. Links into the source become their text, and pictures
    their description. Code stays as it is."""
    parts = re.split(r"(```.*?```)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    for i in range(0, len(parts), 2):
        pictures_described = re.sub(r"!\[([^\]]*)\]\((?!https?:)[^)]*\)", r"*Picture in the source: \1.*", parts[i])
        parts[i] = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", pictures_described)
    return "".join(parts)


class BuildPackage(build_py):
    """Adds the libraries to the package."""

    def run(self) -> None:
        super().run()
        home = ROOT if self.editable_mode else Path(self.build_lib)
        target = home / "proto_reg" / "kernels" / "lib"
        shutil.rmtree(target, ignore_errors=True)  # setuptools keeps its build folder: no library of an earlier build
        for backend in wanted():
            with tempfile.TemporaryDirectory() as scratch:
                library = load_builder().build(backend, directory=Path(scratch))
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, target)


class InstallEditable(editable_wheel):
    """Makes the root of the source a plain path in a .pth file, which type checkers and editors follow.

    For that the packages must lie as they are imported, so ``proto_reg/integrations`` becomes a link. If a system
    allows
    no links, setuptools installs an import hook instead: imports work, but type checkers find nothing.
    """

    def run(self) -> None:
        source, link = ROOT / "integrations", ROOT / "proto_reg" / "integrations"
        with contextlib.suppress(OSError):  # it is there already, or cannot be made
            link.symlink_to(Path("..", "integrations"), target_is_directory=True)
        if link.exists() and link.samefile(source):
            self.package_dir = {"": "."}
        super().run()


class BuildWheel(bdist_wheel):
    """The libraries use the stable ABI: any Python 3, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if wanted() else tag


class Package(setuptools.Distribution):
    """A package for one platform if it holds a library."""

    def has_ext_modules(self) -> bool:
        return bool(wanted())


setuptools.setup(
    distclass=Package,
    cmdclass={"build_py": BuildPackage, "editable_wheel": InstallEditable, "bdist_wheel": BuildWheel},
    long_description=page(),
    long_description_content_type="text/markdown",
)
