"""The structure of the package: imports go one way, they are light, and the public names are fixed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import proto_reg

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "proto_reg"
# A room is a module or a folder of the package. Each room may import only from the rooms before it.
ROOMS = [
    "_torch",
    "_checks",
    "_distributed",
    "_random",
    "_state",
    "layout",
    "batch",
    "output",
    "replay",
    "schedule",
    "kernels",
    "mixture",
    "functional",
    "_peers",
    "_bench",
    "recent",
    "clusters",
    "head",
    "assigner",
    "mmd",
    "noise",
    "balance",
    "follower",
    "queue",
    "usage",
    "pull",
    "record",
    "fused",
    "revival",
    "_wiring",
    "_warnings",
    "scale",
    "regularizer",
    "training",
    "plots",
    "attachment",
    "__init__",
]


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(path: Path) -> set[str]:
    """The rooms that ``path`` imports. Imports inside the package must be relative."""
    tree = ast.parse(path.read_text())
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("proto_reg") for name in node.names), path
        if not isinstance(node, ast.ImportFrom):
            continue
        assert not (node.module or "").startswith("proto_reg"), path
        if node.level == depth:  # relative to the package's root
            found |= {node.module.split(".")[0]} if node.module else {name.name for name in node.names}
    return found


# Programs are outside of this order: ``python -m`` may import every room.
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_run_one_way(path: Path) -> None:
    here = ROOMS.index(room(path))
    for other in imported_rooms(path):
        assert ROOMS.index(other) < here, f"{path} imports {other}"


def test_examples_and_integrations_use_public_names_only() -> None:
    for path in [*(ROOT / "examples").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("proto_reg"):
                adapter = path.parent.name == "examples" and node.module.startswith("proto_reg.integrations.")
                assert node.module == "proto_reg" or adapter, path


def test_public_names() -> None:
    assert set(proto_reg.__all__) == {
        "AnchoredMMDLoss",
        "Attachment",
        "LatentNoise",
        "LatentQueue",
        "PrototypeHead",
        "PrototypeMixture",
        "PrototypeWarning",
        "PrototypicalRegularizer",
        "PrototypicalTrainerMixin",
        "PrototypicalTraining",
        "RegularizerOutput",
        "Schedule",
        "SinkhornAssigner",
        "attach",
        "functional",
    }
    for name in ("sinkhorn", "anchored_mmd", "prototype_cross_entropy", "latent_metrics"):
        assert callable(getattr(proto_reg.functional, name))
    fields = ("loss", "prototype_loss", "mmd_loss", "scores", "codes", "assignments")
    assert proto_reg.RegularizerOutput._fields == fields


def test_everything_public_is_documented() -> None:
    members = {name: getattr(proto_reg, name) for name in proto_reg.__all__}
    members |= {f"functional.{name}": getattr(proto_reg.functional, name) for name in proto_reg.functional.__all__}
    for name, member in members.items():
        assert member.__doc__, name
        own = vars(member).items() if isinstance(member, type) else ()
        for attribute, value in own:
            if callable(value) and not attribute.startswith("_") and attribute != "extra_repr":
                assert value.__doc__, f"{name}.{attribute}"


def test_import_is_light() -> None:
    """The import adds only our own modules, einops and the standard library to torch's imports."""
    code = """
import sys, torch
before = set(sys.modules)
import proto_reg
print(*sorted(set(sys.modules) - before))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {name.split(".")[0] for name in run.stdout.split()} - sys.stdlib_module_names
    assert found <= {"proto_reg", "einops", "typing_extensions"}


# Functions of torch that make new tensors. Those in COUNTING make whole numbers and need no dtype.
FACTORIES = {"ones", "zeros", "full", "empty", "empty_strided", "tensor", "as_tensor", "asarray", "scalar_tensor"}
FACTORIES |= {"rand", "randn", "normal", "eye", "linspace", "logspace", "hann_window", "from_numpy"}
COUNTING = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}


def test_every_tensor_is_told_its_device_and_dtype() -> None:
    """The exception is what a module registers. It follows the defaults, as in torch's own modules."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        registered = {
            id(inner)
            for call in calls
            if call.func.attr in ("register_buffer", "Parameter")
            for inner in ast.walk(call)
            if inner is not call
        }
        for call in calls:
            of_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
            if not of_torch or call.func.attr not in FACTORIES | COUNTING or id(call) in registered:
                continue
            told = {keyword.arg for keyword in call.keywords}
            needed = {"device", "dtype"} if call.func.attr in FACTORIES else {"device"}
            assert needed <= told, f"{path.name}:{call.lineno}: {ast.unparse(call)}"


def test_without_numpy_there_is_no_word_of_it() -> None:
    code = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "numpy":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
import proto_reg
import torch

layer = proto_reg.PrototypicalRegularizer(4, 3)
z, info = layer(torch.randn(16, 4, requires_grad=True))
z.sum().backward()
assert layer.head.prototypes.grad.isfinite().all()
"""
    result = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "numpy" not in result.stderr.lower(), result.stderr


def test_the_wheels_package_list_is_the_tree() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib")
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inside = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("*.py")}
    assert set(listed) == inside | {"proto_reg.integrations", "proto_reg.csrc"}


def test_ops_are_registered_once_and_have_no_surprises() -> None:
    for name in ("sinkhorn", "anchored_mmd", "weighted_mmd", "follow", "snapshot"):
        assert getattr(torch.ops.proto_reg, name).default is not None


def test_the_page_on_kernels_names_what_exists() -> None:
    """The files, functions, types and excerpts of docs/reading-a-kernel.md exist in the sources."""
    page = (ROOT / "docs" / "reading-a-kernel.md").read_text()
    prose, *excerpts = re.split(r"^```(?:cpp)?\n", page, flags=re.MULTILINE)
    prose, excerpts = "".join([prose, *excerpts[1::2]]), excerpts[::2]
    named = set(re.findall(r"`([^`\n]+)`", prose))
    files = {name for name in named if re.search(r"\.(h|cpp|cuh?|py)$", name)}
    assert {
        name for name in files if not any((folder / name).is_file() for folder in (ROOT, PACKAGE / "csrc"))
    } == set()
    sources = {path: path.read_text() for path in (PACKAGE / "csrc").iterdir() if path.is_file()}
    everything = "\n".join([*sources.values(), *((ROOT / name).read_text() for name in files if name.endswith(".py"))])
    names = {name for name in named - files if re.fullmatch(r"\w{2,}", name)}
    assert len(files) > 15 and len(names) > 40
    assert {name for name in names if not re.search(rf"\b{name}\b", everything)} == set()
    # If the page says that a file holds a name, the file holds it.
    placed = re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.\w+)`", prose)
    assert len(placed) > 5
    for name, file in placed:
        (path,) = (p for p in (ROOT / file, PACKAGE / "csrc" / file) if p.is_file())
        assert re.search(rf"\b{name}\b", path.read_text()), (name, file)
    assert excerpts and all(any(excerpt in text for text in sources.values()) for excerpt in excerpts)


def test_headers_for_an_instruction_set_stay_apart() -> None:
    """They have no standard header and one unnamed namespace, so the linker merges no functions of two machines."""
    pending, seen = ["cpu_kernel_table.h"], {"cpu_plain.h"}
    while pending:
        name = pending.pop()
        text = (PACKAGE / "csrc" / name).read_text()
        includes = re.findall(r"^#include (\S+)$", text, flags=re.MULTILINE)
        assert [path for path in includes if path.startswith("<")] == [], name
        assert text.count("namespace proto_reg {") == text.count("namespace proto_reg { namespace {") == 1, name
        seen.add(name)
        pending += [path.strip('"') for path in includes if path.strip('"') not in seen]
    assert len(seen) > 10
