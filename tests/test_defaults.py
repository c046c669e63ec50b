"""Torch's defaults belong to the user. The layer computes on the device and in the dtype of its input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from layers import DIM, OPTIONS, SHARES, K, layer_with
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from proto_reg import PrototypicalRegularizer
from proto_reg.functional import anchored_mmd, latent_metrics, sinkhorn

BATCH, STEPS = 32, 12


@contextmanager
def default(kind: str) -> Iterator[None]:
    """Set another default dtype or device inside the ``with`` block."""
    if kind == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


class Made(TorchDispatchMode):
    """Records the devices and dtypes of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(found):
            if isinstance(value, Tensor):
                self.kinds.add((value.device.type, value.dtype))
        return found


def walk(layer: PrototypicalRegularizer, steps: int) -> list[Tensor]:
    """Train, and call everything that a user calls on the way. Return all results."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(BATCH, DIM, generator=generator, dtype=torch.float32, device="cpu") for _ in range(steps)]
    mask = torch.arange(BATCH, device="cpu") > 3
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    found = []
    for i, z in enumerate(data):
        leaf = z.requires_grad_()
        out, info = layer(leaf, mask if i % 2 else None)
        loss = out.square().sum() + info.loss if layer.mode == "weighted" else out.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found += [leaf.grad, out.detach(), *(value.detach() for value in info)]
    with torch.no_grad():
        found += [layer.usage, *layer.losses(data[0], mask), *layer.head.mixture().sample((3,))]
        found += [layer.head.sample(4), layer.head.sample(4, prototype=1), layer.head.mixture().log_prob(data[0])]
        found += [value for value in latent_metrics(data[0], layer.head).values() if isinstance(value, Tensor)]
        layer.metrics()
        if layer.tracking:
            layer.revive(data[0], threshold=0.19)
        layer.head.init_from(data[0])
        layer.load_state_dict(layer.state_dict())
        found += [*layer.eval()(data[0])[1], *layer.state_dict().values()]
    return found


@pytest.mark.warm_up
@pytest.mark.parametrize("mode", ["balanced", "weighted"])
@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "maps"])
@pytest.mark.parametrize("kind", ["float64", "meta"])
@pytest.mark.filterwarnings("ignore:metrics. no latent was counted:proto_reg.PrototypeWarning")
def test_a_training_under_other_defaults_is_the_same(kind: str, options: str, mode: str) -> None:
    # With the plain options, the training goes past the 50 steps of the default start.
    steps = 60 if options == "plain" else STEPS
    trainings = []
    for other in (False, True):
        torch.manual_seed(0)
        layer = layer_with(options, mode=mode)
        if not other:
            trainings.append(walk(layer, steps))
            continue
        with default(kind), Made() as made:
            trainings.append(walk(layer, steps))
    for ours, theirs in zip(*trainings, strict=True):
        assert (ours.device, ours.dtype) == (theirs.device, theirs.dtype)
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert {device for device, _ in made.kinds} == {"cpu"}


@pytest.mark.parametrize("kind", ["float64", "meta"])
def test_functions_under_other_defaults_are_the_same(kind: str) -> None:
    z, v = torch.randn(BATCH, DIM), torch.randn(K, DIM)
    members = torch.arange(BATCH) % K

    def everything() -> list[Tensor]:
        scores = z @ v.T / 8
        found = [sinkhorn(scores, marginals=SHARES), *sinkhorn(scores, tol=1e-2, return_potentials=True)]
        found += [sinkhorn(scores, mask=members > 0, weights=z.abs().sum(1)), sinkhorn(scores, hard=True)]
        found += [anchored_mmd(z, v, members, features=9), anchored_mmd(z, v, members, kernel="imq", std=0.5)]
        return found

    expected = everything()
    with default(kind):
        for ours, theirs in zip(everything(), expected, strict=True):
            assert (ours.device, ours.dtype) == (theirs.device, theirs.dtype)
            assert torch.equal(ours, theirs)
