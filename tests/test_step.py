"""The balanced step as one operator: against its reference in float64, in a training, and when the layer uses it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import across_instruction_sets, untracked
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from proto_reg import AnchoredMMDLoss, LatentQueue, PrototypeHead, PrototypicalRegularizer, Schedule, SinkhornAssigner
from proto_reg.functional.mmd import DEFAULT_SCALES
from proto_reg.kernels import backends, layer_ops
from proto_reg.kernels.step import balanced_step_reference

DIM, K, BATCH = 16, 5, 48
SIMILARITIES = ("cosine", "dot", "euclidean")
operators = torch.ops.proto_reg


@pytest.fixture(autouse=True)
def loaded(cpu_library: object) -> None:
    assert backends.choose("cpu", torch.zeros(1, 1)) == "cpu"


def case(count: int, groups: int, dim: int, similarity: str = "cosine", **changes) -> dict:
    """All arguments of the operator: latents around some prototypes, and state from earlier latents."""
    v = 0.5 * torch.randn(groups, dim)
    scale = 1.0 if similarity == "cosine" else float(dim)
    return {
        "z": v[torch.randint(groups, (count,))] + torch.randn(count, dim),
        "mask": None,
        "prototypes": v,
        "marginals": None,
        "shares": None,
        "sharpness": None,
        "similarity": similarity,
        "std": 1.0,
        "epsilon": 0.05 * scale,
        "num_iters": 3,
        "tol": None,
        "isolate": False,
        "temperature": 0.1 * scale,
        "scales": list(DEFAULT_SCALES),
        "unbiased": True,
        "by_mass": True,
        "prototype_weight": 0.3,
        "mmd_weight": 0.2,
        "sums": torch.randn(groups, dim),
        "weight_sums": torch.randint(3, (groups,)) / 4,
        "last_prototypes": v + 0.01,
        "follow_rate": 0.02,
        "usage": torch.arange(groups),
        "totals": torch.rand(4),
        "steps": torch.tensor(7),
        "ring": torch.zeros(64, dim),
        "written": torch.tensor(50),
        "at_once": 32,
    } | changes


def copies(arguments: dict, dtype: torch.dtype) -> dict:
    def copy(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
        return value

    return {name: copy(value) for name, value in arguments.items()}


def compare(arguments: dict, tolerance: float = 2e-5) -> None:
    """Compare results and state with the reference in float64. Errors are relative to the largest entry."""
    ours, theirs = copies(arguments, torch.float32), copies(arguments, torch.float64)
    with torch.no_grad():
        found = operators.balanced_step(*ours.values())
        expected = balanced_step_reference(*theirs.values())
    found += tuple(value for value in ours.values() if isinstance(value, Tensor))
    expected += tuple(value for value in theirs.values() if isinstance(value, Tensor))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        largest = float(b.double().abs().nan_to_num().amax()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * largest + 1e-6, equal_nan=True)


# The examples are always the same. A direction is a gradient divided by its length. If a random example has a length
# near 0, its direction is only rounding.
@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    count=st.integers(16, 120),
    groups=st.integers(2, 40),
    dim=st.sampled_from([2, 3, 15, 16, 17, 31, 32, 33, 64, 100]),
    similarity=st.sampled_from(SIMILARITIES),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape_against_float64(count, groups, dim, similarity, masked, seed) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(count) < 0.8 if masked else None
    arguments = case(count, groups, dim, similarity, mask=mask)
    # If two codes are nearly equal, float32 may choose another prototype than float64.
    with torch.no_grad():
        codes = balanced_step_reference(*copies(arguments, torch.float64).values())[-2]
    first = codes.topk(2, 1).values
    assume((first[:, 0] - first[:, 1]).amin() > 1e-4)
    compare(arguments, 1e-3)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("shape", [(48, 30, 32), (300, 40, 100), (600, 9, 200)])
def test_small_and_large_products(shape: tuple[int, int, int], similarity: str) -> None:
    compare(case(*shape, similarity), 1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"marginals": torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1])},
        {"tol": 1e-2, "num_iters": 50},
        {"sharpness": torch.tensor(0.4)},
        {"shares": torch.tensor(0.3)},
        {"shares": torch.tensor(0.0)},
        {"shares": torch.tensor([0.0, 0.6])},
        {"shares": torch.tensor([0.4, 1.0]), "mask": torch.arange(BATCH) % 3 > 0},
        {"shares": torch.tensor([1.0, 0.0])},
        {"shares": torch.tensor(0.5), "sharpness": torch.tensor(2.0), "mask": torch.arange(BATCH) % 3 > 0},
        {"mask": torch.zeros(BATCH, dtype=torch.bool)},
        {"unbiased": False, "by_mass": False, "scales": [1.0]},
        {"prototype_weight": 0.0},
        {"std": 0.4},
        {"similarity": "dot", "std": 3.0},
        {"similarity": "euclidean", "std": 0.4},
        {"last_prototypes": None},
        {"sums": None, "weight_sums": None, "last_prototypes": None},
        {"usage": None, "totals": None, "steps": None},
        {"ring": None, "written": None},
        {"at_once": 64, "mask": torch.arange(BATCH) % 3 > 0},
        {"written": torch.tensor(3 * 32), "at_once": 20},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_option_against_float64(changes: dict) -> None:
    compare(case(BATCH, K, DIM, **changes))


def test_prototypes_that_were_not_moved_do_not_follow() -> None:
    arguments = case(BATCH, K, DIM)
    arguments["last_prototypes"] = arguments["prototypes"].clone()
    compare(arguments)
    after = copies(arguments, torch.float32)
    *_, assignments = operators.balanced_step(*after.values())
    assert torch.equal(after["prototypes"], arguments["prototypes"])
    weights = (1 + (after["z"] - after["prototypes"][assignments]).square().mean(1)) ** -2
    torch.testing.assert_close((after["weight_sums"] - arguments["weight_sums"]).sum(), weights.sum())


@pytest.mark.parametrize(("groups", "dim"), [(1, DIM), (1, 1), (K, 1)])
def test_where_the_prototype_loss_has_no_gradient(groups: int, dim: int) -> None:
    """There is one prototype, or cosines on a line are only signs. Only rounding remains, and it stays finite."""
    found = operators.balanced_step(*case(BATCH, groups, dim).values())
    assert all(result.isfinite().all() for result in found)
    if groups == 1:
        assert not found[1].any()


def test_rows_that_are_not_finite_are_isolated_and_not_counted() -> None:
    arguments = case(BATCH, K, DIM, isolate=True)
    with torch.no_grad():
        arguments["z"][3, 2] = torch.nan
        found = operators.balanced_step(*copies(arguments, torch.float32).values())
    assert found[6].isnan().any(1).tolist() == [i == 3 for i in range(BATCH)]
    assert found[3].isfinite()


def test_non_contiguous_inputs() -> None:
    arguments = case(BATCH, K, DIM)
    strided = copies(arguments, torch.float32)
    strided["z"] = strided["z"].T.contiguous().T
    found = operators.balanced_step(*strided.values())
    expected = operators.balanced_step(*copies(arguments, torch.float32).values())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    strided["prototypes"] = strided["prototypes"].T.contiguous().T
    with pytest.raises(RuntimeError, match="contiguous prototypes"):
        operators.balanced_step(*strided.values())


def test_opcheck() -> None:
    arguments = case(9, 3, 4, mask=torch.arange(9) > 2)
    torch.library.opcheck(operators.balanced_step.default, tuple(arguments.values()))
    torch.library.opcheck(operators.attach.default, (torch.randn(6, 5), torch.randn(6, 5), torch.randn(3, 5)))


@pytest.mark.parametrize("shape", [(48, 32), (3, 5), (2, 7, 3, 3), (0, 4)])
def test_attach(shape: tuple[int, ...]) -> None:
    gradient, direction, step = torch.randn(shape), torch.randn(shape), torch.randn(4, 6)
    for given_ in (gradient, torch.ones(()).expand(shape)):
        with torch.no_grad():
            found = layer_ops.attach(given_, direction.mT.contiguous().mT, step)
        expected = layer_ops.attach_reference(given_.double(), direction.double(), step.double())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


class Names(TorchDispatchMode):
    """Records the names of the called operators of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def taken(layer: PrototypicalRegularizer, z: Tensor, mask: Tensor | None = None) -> bool:
    with Names() as names:
        layer(z.requires_grad_(), mask)[0].sum().backward()
    return "proto_reg.balanced_step.default" in names.seen


def test_where_it_is_taken() -> None:
    z, mask = torch.randn(BATCH, DIM), torch.rand(BATCH) > 0.2
    for options in (
        {},
        {"schedule": Schedule(warmup_steps=2, ramp_steps=3)},
        {"schedule": Schedule(warmup_steps=1, mmd_steps=2, ramp_steps=2)},
        {"schedule": Schedule(temperature=(0.3, 0.1), temperature_steps=4)},
        {"head": PrototypeHead(DIM, K, similarity="euclidean")},
        {"assigner": SinkhornAssigner(nan_policy="isolate", marginals=[0.2] * K, tol=1e-2)},
        {"follow_rate": 0.0},
        {"group": None},
    ):
        assert taken(PrototypicalRegularizer(DIM, K, **options), z, mask), options
    assert taken(PrototypicalRegularizer(DIM, K, layout="b d h w"), torch.randn(2, DIM, 3, 3))
    assert taken(PrototypicalRegularizer(DIM, K), z.bfloat16())
    assert taken(untracked(PrototypicalRegularizer(DIM, K)), z)
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(PrototypicalRegularizer(DIM, K), z.detach())


def test_where_it_is_not_taken() -> None:
    class Own(PrototypeHead):
        pass

    z = torch.randn(BATCH, DIM)
    for options in (
        {"queue": LatentQueue(8, DIM)},
        {"mmd": AnchoredMMDLoss(max_tokens=20)},
        {"mode": "weighted"},
        {"head": Own(DIM, K)},
        {"mmd": AnchoredMMDLoss("energy")},
        {"mmd": AnchoredMMDLoss(backend="torch")},
        {"assigner": SinkhornAssigner(backend="torch")},
        {"prototype_weight": 0.0},
    ):
        assert not taken(PrototypicalRegularizer(DIM, K, **options), z), options
    assert not taken(PrototypicalRegularizer(DIM, K).double(), z.double())
    assert not taken(PrototypicalRegularizer(DIM, K).double().float(), z)  # its state stays float64


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"schedule": Schedule(warmup_steps=2, ramp_steps=2)}, {"layout": "b d h w"}], ids=str
)
def test_a_training_is_that_of_float64(options: dict, masked: bool) -> None:
    torch.manual_seed(1)
    encoder, layer = nn.Linear(DIM, DIM), PrototypicalRegularizer(DIM, K, **options)
    wide = PrototypicalRegularizer(DIM, K, **options)
    wide.load_state_dict(layer.state_dict())
    parts = [(encoder, layer), (nn.Linear(DIM, DIM).double(), wide.double())]
    parts[1][0].load_state_dict(encoder.state_dict())
    optimizers = [torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1) for a, b in parts]
    maps = "layout" in options
    for _ in range(6):
        x = torch.randn(BATCH, DIM)
        mask = torch.rand(BATCH) > 0.2 if masked else None
        for (encode, regularize), optimizer in zip(parts, optimizers, strict=True):
            z = encode(x.to(encode.weight.dtype))
            z = z.unflatten(0, (3, 4, 4)).permute(0, 3, 1, 2) if maps else z
            out, _ = regularize(z, mask.unflatten(0, (3, 4, 4)) if maps and masked else mask)
            optimizer.zero_grad()
            (out - 1).square().mean().backward()
            optimizer.step()
    for name, value in wide.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name].double(), value.double(), rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(parts[0][0].weight.double(), parts[1][0].weight, rtol=1e-4, atol=1e-5)


BY_ISA = """
import sys, torch
sys.path.insert(0, "tests")
from proto_reg.kernels import backends
from test_step import case
torch.manual_seed(0)
assert backends.choose("cpu", torch.zeros(1, 1)) == "cpu"
results = []
for shape in ((5, 1, 1), (48, 30, 32), (50, 7, 17), (40, 3, 100)):
    for similarity in ("cosine", "euclidean"):
        results += torch.ops.proto_reg.balanced_step(*case(*shape, similarity).values())
torch.save(results, sys.argv[1])
"""


@pytest.mark.slow
def test_instruction_sets_agree(tmp_path: Path) -> None:
    for a, b in across_instruction_sets(BY_ISA, tmp_path):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 * float(b.abs().max()) + 1e-6)
