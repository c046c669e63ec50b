"""Two gloo processes: parameters stay equal, for the layer under DDP and for Algorithm 1."""

from __future__ import annotations

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
