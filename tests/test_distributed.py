"""Two gloo processes: parameters stay equal, for the layer under DDP and for Algorithm 1."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from proto_reg import PrototypicalRegularizer, PrototypicalTraining

DIM, K = 8, 4


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, DIM), nn.Linear(DIM, 12)
        self.regularizer = PrototypicalRegularizer(DIM, K, warmup_steps=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.regularizer(self.encoder(x))[0])


def data(rank: int) -> torch.Tensor:
    return torch.rand(5, 32, 12, generator=torch.Generator().manual_seed(rank))


def ddp(rank: int) -> nn.Module:
    model = Autoencoder()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.05)
    for x in data(rank):
        optimizer.zero_grad()
        (wrapped(x) - x).square().mean().backward()
        optimizer.step()
    return model


def algorithm_1(rank: int) -> nn.Module:
    model = Autoencoder()
    training = PrototypicalTraining(model.encoder, model.decoder, model.regularizer, warmup_epochs=0)
    for x in data(rank):
        training.step(x)
    return model


def worker(rank: int, store: str, name: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        start = [p.clone() for p in Autoencoder().parameters()]
        torch.manual_seed(0)
        model = {"ddp": ddp, "algorithm_1": algorithm_1}[name](rank)
        assert all(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
        torch.save(model.state_dict(), f"{out}{rank}")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["ddp", "algorithm_1"])
def test_ranks_stay_equal(name: str, tmp_path: Path) -> None:
    out = tmp_path / "rank"
    mp.spawn(worker, (str(tmp_path / "store"), name, str(out)), nprocs=2)
    first, second = (torch.load(f"{out}{rank}", weights_only=True) for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def lifecycle(rank: int, out: str) -> None:
    """A layer that sees this rank's latents; what it says of all, and a revival from latents of the rank's own."""
    torch.manual_seed(0)
    layer = PrototypicalRegularizer(DIM, K, queue_size=40, queue_mmd=True)
    wrapped = DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    layer.head.prototypes.data.abs_()[3] *= -1
    for z in latents(rank):
        wrapped(z.requires_grad_())[0].sum().backward()
        optimizer.step()
    seen = {"metrics": layer.metrics(), "usage": layer.usage, "queue": layer.queue.state_dict()}
    seen = {"counts": layer.meter.counts.clone(), **copy.deepcopy(seen)}
    # Only rank 1 has too few: neither goes on alone.
    with pytest.raises(ValueError, match="finite latents, one for each prototype"):
        layer.revive(torch.full((9, DIM), torch.nan if rank else 1.0))
    seen["revived"] = layer.revive(torch.randn(9, DIM, generator=torch.Generator().manual_seed(rank)))
    torch.save({**seen, "state": layer.state_dict()}, f"{out}{rank}")


def latents(rank: int) -> list[torch.Tensor]:
    """Batches of unequal sizes around the first prototypes, which all ranks start with."""
    generator = torch.Generator().manual_seed(10 + rank)
    return [1 + torch.randn(size, DIM, generator=generator) for size in ((16, 9, 12), (7, 20, 1))[rank]]


def switched_off(rank: int, out: str) -> None:
    """Weights of 0 leave the prototypes without a gradient; DistributedDataParallel waits for none."""
    torch.manual_seed(0)
    model = Autoencoder()
    model.regularizer.prototype_weight = model.regularizer.mmd_weight = 0.0
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for x in data(rank):
        optimizer.zero_grad()
        (wrapped(x) - x).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{out}{rank}")


def member(rank: int, store: str, act, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        act(rank, out)
        torch.distributed.barrier()  # no rank takes the group down while another still talks
    finally:
        torch.distributed.destroy_process_group()


def test_usage_queue_and_revival_are_those_of_all_ranks(tmp_path: Path) -> None:
    out = tmp_path / "rank"
    mp.spawn(member, (str(tmp_path / "store"), lifecycle, str(out)), nprocs=2)
    first, second = (torch.load(f"{out}{rank}", weights_only=True) for rank in range(2))
    assert first["metrics"] == second["metrics"]
    assert int(first["counts"].sum()) == 65
    # Rank after rank, step after step; of 65 latents the last 40.
    order = torch.cat([z for step in zip(latents(0), latents(1), strict=True) for z in step])
    queue = first["queue"]
    assert torch.equal(queue["latents"].roll(-int(queue["position"]), 0), order[-40:])
    assert first["revived"].tolist() == second["revived"].tolist() == [3]
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key


def test_a_layer_switched_off_goes_through_ddp(tmp_path: Path) -> None:
    out = tmp_path / "rank"
    mp.spawn(member, (str(tmp_path / "store"), switched_off, str(out)), nprocs=2)
    first, second = (torch.load(f"{out}{rank}", weights_only=True) for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
