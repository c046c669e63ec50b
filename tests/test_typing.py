"""A type checker's report on a user's program."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import proto_reg
from proto_reg import PrototypicalRegularizer, PrototypicalTrainerMixin, PrototypicalTraining, RegularizerOutput
from proto_reg.integrations.lightning import PrototypeCallback
from proto_reg.integrations.vq import VectorPrototypes

layer = PrototypicalRegularizer(32, num_prototypes=30, mode="weighted")
z, info = layer(torch.randn(48, 32))
assert_type(z, Tensor)
assert_type(info, RegularizerOutput)
assert_type(info.loss, Tensor)
assert_type(info.assignments, Tensor)
assert_type(layer(z, torch.ones(48, dtype=torch.bool)), tuple[Tensor, RegularizerOutput])

assert_type(layer.head(z), Tensor)
assert_type(layer.head.sample(3), Tensor)
assert_type(proto_reg.PrototypeHead(32, 30, similarity="euclidean").prototypes, nn.Parameter)

codes = proto_reg.SinkhornAssigner(epsilon=0.1)(info.scores)
assert_type(codes, Tensor)
assert_type(proto_reg.functional.sinkhorn(info.scores, 0.05, 3), Tensor)
assert_type(proto_reg.functional.sinkhorn(info.scores, return_potentials=True), tuple[Tensor, Tensor])
assert_type(proto_reg.AnchoredMMDLoss()(z, layer.head.prototypes, codes), Tensor)
assert_type(layer.metrics(), dict[str, float])


class Trainer(PrototypicalTrainerMixin):
    def __init__(self) -> None:
        self.init_prototypical(nn.Linear(64, 32), nn.Linear(32, 64), layer, warmup_epochs=1)


trainer = Trainer()
assert_type(trainer.prototypical, PrototypicalTraining)
assert_type(trainer.prototypical_step(torch.rand(48, 64)), dict[str, Tensor])
assert_type(trainer.prototypical_fit([torch.rand(48, 64)], epochs=2), list[dict[str, float]])

attachment = proto_reg.attach(nn.Sequential(nn.Linear(64, 32)), "0", latent_dim=32, num_prototypes=30)
assert_type(attachment.loss, Tensor)
assert_type(VectorPrototypes(dim=64, codebook_size=512)(torch.randn(2, 5, 64)), tuple[Tensor, Tensor, Tensor])
assert_type(PrototypeCallback("encoder", latent_dim=32, num_prototypes=30), PrototypeCallback)
"""


def pyright(program: str, folder: Path) -> list[str]:
    """Run pyright on ``program`` outside of the repository. Return the rule and the message of each error."""
    path = folder / "program.py"
    path.write_text(program)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode in (0, 1), run.stdout + run.stderr  # 1 means that it found errors
    report = json.loads(run.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    return [f"{found.get('rule')}: {found['message']}" for found in report["generalDiagnostics"]]


def test_a_users_program_is_typed(tmp_path: Path) -> None:
    assert pyright(PROGRAM, tmp_path) == []


def test_a_users_mistake_is_found(tmp_path: Path) -> None:
    mistakes = """
import torch
import proto_reg

z, info = proto_reg.PrototypicalRegularizer(4, 3)(torch.randn(8, 4))
print(info.losses, proto_reg.PrototypeHead(4, 3)("latents"))
"""
    attribute, argument = pyright(mistakes, tmp_path)
    assert "losses" in attribute
    assert "reportAttributeAccessIssue" in attribute
    assert "reportArgumentType" in argument


def modules() -> list[ast.ClassDef]:
    """Every class of the package and the integrations that has its own ``forward`` and that torch calls."""
    paths = [*(ROOT / "proto_reg").glob("*.py"), *(ROOT / "integrations").glob("*.py")]
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return [
        node
        for node in nodes
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(isinstance(inner, ast.FunctionDef) and inner.name == "forward" for inner in node.body)
        and not any("Function" in ast.unparse(base) for base in node.bases)
    ]


@pytest.mark.parametrize("module", modules(), ids=lambda node: node.name)
def test_a_call_has_the_signature_of_forward(module: ast.ClassDef) -> None:
    named = {node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
    forward, call = named["forward"], named["__call__"]
    assert ast.unparse(call.args) == ast.unparse(forward.args)
    assert ast.unparse(call.returns) == ast.unparse(forward.returns)
