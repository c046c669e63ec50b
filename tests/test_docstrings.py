"""Public docstrings link only to public names."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import proto_reg
from proto_reg import functional, plots

INTEGRATIONS = Path(__file__).resolve().parents[1] / "integrations"
LINK = re.compile(r":(?:func|class|meth|attr|mod|data):`~?([^`]+)`")


def documented(name: str, thing: object) -> Iterator[tuple[str, str]]:
    """Pairs (dotted name, docstring) of ``thing`` and its members. Members of our base classes are included."""
    yield name, inspect.getdoc(thing) or ""
    bases = inspect.getmro(thing) if inspect.isclass(thing) else ()
    for base in bases:
        if base.__module__.startswith("proto_reg"):
            for member, value in vars(base).items():
                if not member.startswith("_"):
                    yield f"{name}.{member}", inspect.getdoc(value) or ""


def of_module(prefix: str, module: ModuleType, names: list[str]) -> dict[str, str]:
    return {key: text for name in names for key, text in documented(f"{prefix}.{name}", getattr(module, name))}


def of_source(path: Path) -> dict[str, str]:
    """The same for an integration's source file. Its framework may not be installed."""
    prefix = f"proto_reg.integrations.{path.stem}"
    tree = ast.parse(path.read_text())
    found = {prefix: ast.get_docstring(tree) or ""}
    parts = [(prefix, node) for node in tree.body]
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    parts += [(f"{prefix}.{node.name}", inner) for node in classes for inner in node.body]
    for scope, node in parts:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            found[f"{scope}.{node.name}"] = ast.get_docstring(node) or ""
    return found


PLOTS = [
    name for name, value in vars(plots).items() if inspect.isfunction(value) and value.__module__ == plots.__name__
]
PUBLIC = of_module("proto_reg", proto_reg, proto_reg.__all__)
PUBLIC |= of_module("proto_reg.functional", functional, functional.__all__)
PUBLIC |= of_module("proto_reg.plots", plots, [name for name in PLOTS if not name.startswith("_")])
for source in sorted(INTEGRATIONS.glob("*.py")):
    PUBLIC |= of_source(source)


def is_public(link: str, where: str) -> bool:
    """Whether ``link`` in the docstring of ``where`` is a public name: in full, or inside a scope around ``where``."""
    scopes = [where.rsplit(".", depth)[0] for depth in range(where.count(".") + 1)]
    names = [link] if link.startswith("proto_reg.") else [f"{scope}.{link}" for scope in scopes]
    return any(name in PUBLIC for name in names)


def test_links_are_told_apart() -> None:
    layer = "proto_reg.PrototypicalRegularizer"
    for link in (layer, "forward", "PrototypeHead", "PrototypeHead.sample", "proto_reg.functional.sinkhorn"):
        assert is_public(link, f"{layer}.metrics"), link
    for link in (
        "_forward",
        "proto_reg.kernels.layer_ops.times_share",
        ".kernels.layer_ops.times_share",
        "PrototypeFollower",
        "absent",
    ):
        assert not is_public(link, f"{layer}.metrics"), link


@pytest.mark.parametrize("where", [name for name, text in PUBLIC.items() if LINK.search(text)])
def test_public_docstrings_link_to_public_names(where: str) -> None:
    private = {link for link in LINK.findall(PUBLIC[where]) if not is_public(link, where)}
    assert not private
