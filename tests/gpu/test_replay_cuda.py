"""A checkpoint around the layer on a GPU. There, the backward pass runs in a thread of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from proto_reg import AnchoredMMDLoss, LatentQueue, PrototypicalRegularizer, Schedule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False")

OPTIONS = {
    "plain": {},
    "queue": {"queue": LatentQueue(256, 16)},
    "subsample": {"mmd": AnchoredMMDLoss(max_tokens=64)},
    "schedules": {"schedule": Schedule(ramp_steps=5, temperature=(0.3, 0.1), temperature_steps=6)},
}


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_checkpoint_changes_nothing(options: str, mode: str) -> None:
    """There are two forwards before each backward pass. The order of sums on a GPU is not fixed."""
    torch.manual_seed(0)
    layer = PrototypicalRegularizer(16, 10, mode=mode, **copy.deepcopy(OPTIONS[options]))
    model = nn.ModuleList([nn.Linear(20, 16), layer, nn.Linear(16, 20)]).cuda()
    x = torch.randn(8, 2, 128, 20, device="cuda")

    def loss(model: nn.ModuleList, x: Tensor) -> Tensor:
        z, info = model[1](model[0](x))
        return nn.functional.mse_loss(model[2](z), x) + info.loss

    trainings = []
    for held in (False, True):
        twin, found = copy.deepcopy(model), []
        adam = torch.optim.SGD(twin.parameters(), lr=1e-2)
        torch.manual_seed(1)
        for pair in x:
            adam.zero_grad()
            run = (lambda *each: checkpoint(loss, *each, use_reentrant=False)) if held else loss
            sum(run(twin, each) for each in pair).backward()
            adam.step()
            found += [parameter.grad.clone() for parameter in twin.parameters()]
        trainings.append([*found, *twin.state_dict().values()])
        assert int(twin[1].steps) == 16
    for ours, theirs in zip(*trainings, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch's own warnings about FSDP1
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused_with_the_cure(use_orig_params: bool, tmp_path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(20, 16), PrototypicalRegularizer(16, 10)).cuda()
        wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params)
        with pytest.raises(RuntimeError, match="fully_shard"):
            wrapped(torch.randn(32, 20, device="cuda"))
    finally:
        torch.distributed.destroy_process_group()
