"""Two gloo processes together compute the same as one process with the whole batch. Their parameters stay equal."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from proto_reg import (
    AnchoredMMDLoss,
    LatentQueue,
    PrototypeHead,
    PrototypicalRegularizer,
    PrototypicalTraining,
    Schedule,
    SinkhornAssigner,
    regularizer,
)
from proto_reg.functional import anchored_mmd, latent_metrics, prototype_cross_entropy, sinkhorn, sinkhorn_cross_entropy
from proto_reg.functional.prototypes import prototype_cross_entropy_and_gradient

DIM, K = 8, 5
SPLITS = [(16, 16), (32, 7), (0, 20)]  # rows on the two ranks


def own(x: Tensor, split: tuple[int, int]) -> Tensor:
    """This rank's rows of a whole batch."""
    return x.split(split)[dist.get_rank()]


def spread(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def averaged(gradient: Tensor, split: tuple[int, int]) -> Tensor:
    """Gradients (n, ...) by the rows of all ranks. As under DDP, they are divided by the number of ranks."""
    whole = gradient.new_zeros(sum(split), *gradient.shape[1:])
    own(whole, split).copy_(gradient / 2)
    dist.all_reduce(whole)
    return whole


# ------------------------------------------------------------------------------------------------------- functions


def sinkhorn_of_the_global_batch() -> None:
    for split in SPLITS:
        n = sum(split)
        scores = spread(0, n, 6)
        weights = spread(1, n).exp() * torch.where(torch.arange(n) % 3 > 0, 1.0, 1e-30)
        mask = spread(2, n) > -0.5
        rows = {"weights": weights, "mask": mask}
        variants: list[dict] = [
            {},
            {"marginals": [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], "num_iters": 20},
            {"weights": weights, "mask": mask},
            {"mask": mask, "tol": 1e-2, "num_iters": 50},
            {"prototype_mask": torch.tensor([True, True, False, True, True, True])},
            {"hard": True},
        ]
        for options in variants:
            for at in (scores, 1e4 * scores):
                whole, potentials = sinkhorn(at, 0.1, return_potentials=True, **options)
                part = {name: own(v, split) if name in rows else v for name, v in options.items()}
                part |= {"group": "default", "return_potentials": True}
                codes, g = sinkhorn(own(at, split), 0.1, **part)
                torch.testing.assert_close(codes, own(whole, split), atol=2e-6, rtol=0)
                torch.testing.assert_close(g, potentials, atol=2e-5, rtol=2e-6)
            codes, g, info = sinkhorn(own(scores, split), 0.1, **part, potentials=potentials / 2, return_info=True)
            whole, potentials, expected = sinkhorn(
                scores, 0.1, return_potentials=True, potentials=potentials / 2, return_info=True, **options
            )
            torch.testing.assert_close(codes, own(whole, split), atol=2e-6, rtol=0)
            torch.testing.assert_close(g, potentials, atol=2e-5, rtol=2e-6)
            torch.testing.assert_close(info.error, expected.error, atol=5e-6, rtol=1e-4)
            assert (info.iterations, info.converged) == (expected.iterations, expected.converged)
        groups = spread(3, 2, n, 6)
        codes = sinkhorn(groups.split(split, 1)[dist.get_rank()], group="default")
        torch.testing.assert_close(codes, sinkhorn(groups).split(split, 1)[dist.get_rank()], atol=2e-6, rtol=0)
    out = torch.empty(5, 6)
    assert sinkhorn(spread(dist.get_rank(), 5, 6), group="default", out=out) is out


def bad_rows_of_the_global_batch() -> None:
    split = (32, 7)
    scores = spread(0, 39, 6)
    scores[3, 2] = torch.nan
    isolated = sinkhorn(own(scores, split), nan_policy="isolate", group="default")
    whole = own(sinkhorn(scores, nan_policy="isolate"), split)
    torch.testing.assert_close(isolated, whole, atol=2e-6, rtol=0, equal_nan=True)
    assert sinkhorn(own(scores, split), group="default").isnan().all()  # propagate: all codes on all ranks are NaN
    with pytest.raises(ValueError, match="1 rows that hold one"):  # the other rank raises, too
        sinkhorn(own(scores, split), nan_policy="raise", group="default")
    with pytest.raises(ValueError, match="group: expected None with differentiable=True"):
        sinkhorn(own(scores, split), differentiable=True, group="default")
    with pytest.raises(ValueError, match="slack: expected None with a group"):
        sinkhorn(own(scores, split), slack=0.1, group="default")


def cross_entropy_of_the_global_batch() -> None:
    for split in SPLITS:
        n = sum(split)
        weights, mask = spread(1, n).exp(), spread(2, n) > -0.5
        for options in ({}, {"weights": weights}, {"mask": mask, "nan_policy": "isolate"}):
            scores = spread(0, n, 6)
            exact = scores.double().requires_grad_()
            wide = {name: v.double() if name == "weights" else v for name, v in options.items()}
            loss = sinkhorn_cross_entropy(exact, **wide)
            expected = torch.autograd.grad(loss, exact)[0].float()
            mine = own(scores.detach(), split).clone().requires_grad_()
            part = {name: own(v, split) if isinstance(v, Tensor) else v for name, v in options.items()}
            value, codes = sinkhorn_cross_entropy(mine, group="default", return_codes=True, **part)
            (gradient,) = torch.autograd.grad(value, mine)
            torch.testing.assert_close(value, loss.detach().float(), atol=1e-6, rtol=1e-6, check_stride=False)
            torch.testing.assert_close(averaged(gradient, split), expected, atol=1e-7, rtol=1e-5)
            torch.testing.assert_close(codes, own(sinkhorn(scores, **options), split), atol=2e-6, rtol=0)
        for together in (prototype_cross_entropy, prototype_cross_entropy_and_gradient):
            scores, codes = spread(0, n, 6).requires_grad_(), spread(1, n, 6).softmax(1)
            loss = prototype_cross_entropy(scores, codes, mask=mask)
            (expected,) = torch.autograd.grad(loss, scores)
            mine = own(scores.detach(), split).clone().requires_grad_()
            value = together(mine, own(codes, split), mask=own(mask, split), group="default")
            value, gradient = value if isinstance(value, tuple) else (value, *torch.autograd.grad(value, mine))
            torch.testing.assert_close(value, loss, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(averaged(gradient, split), expected, atol=1e-7, rtol=1e-5)


def mmd_of_the_global_batch() -> None:
    anchors = spread(9, K, DIM)
    for split in SPLITS:
        n = sum(split)
        latents, mask = spread(0, n, DIM, dtype=torch.float64), spread(2, n) > -0.5
        assignments = torch.arange(n) % (K + 1) - 1  # -1 leaves a latent out
        soft = spread(1, n, K).softmax(1)
        variants: list[tuple[Tensor, dict]] = [
            (assignments, {}),
            (assignments, {"kernel": "energy", "mask": mask, "statistic": "biased", "reduction": "sum"}),
            (assignments, {"features": 24, "mask": mask}),
            (soft, {"kernel": "imq", "mask": mask}),
            (assignments.clamp_min(0), {"target": "sampled"}),
        ]
        for members, options in variants:
            drawn = {"generator": torch.Generator().manual_seed(3)} if "target" in options else {}
            z, v = latents.clone().requires_grad_(), anchors.clone().requires_grad_()
            loss = anchored_mmd(z, v, members, **options, **drawn)
            by_z, by_v = torch.autograd.grad(loss, (z, v))
            drawn = {"generator": torch.Generator().manual_seed(3)} if "target" in options else {}
            mine, v = own(latents, split).clone().requires_grad_(), anchors.clone().requires_grad_()
            part = options | ({"mask": own(mask, split)} if "mask" in options else {})
            value = anchored_mmd(mine, v, own(members, split), group="default", **part, **drawn)
            gradient, by_anchors = torch.autograd.grad(value, (mine, v))
            dist.all_reduce(by_anchors)
            torch.testing.assert_close(value, loss.detach(), atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(averaged(gradient, split), by_z, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(by_anchors / 2, by_v, atol=1e-6, rtol=1e-6)
    nobody = anchored_mmd(latents[:0], anchors, assignments[:0], group="default")
    assert nobody == 0


def metrics_and_initialisation() -> None:
    split = (32, 7)
    z, labels = spread(0, 39, DIM), torch.arange(39) % 3
    whole, parts = PrototypeHead(DIM, K), PrototypeHead(DIM, K)
    if dist.get_rank():
        torch.rand(7)  # the ranks have different random streams; the first one is used
    parts.init_from(own(z, split), torch.Generator().manual_seed(dist.get_rank()))
    whole.init_from(z, torch.Generator().manual_seed(0), group=None)
    assert torch.equal(whole.prototypes, parts.prototypes)
    expected = latent_metrics(z, whole, labels)
    for name, value in latent_metrics(own(z, split), parts, own(labels, split), group="default").items():
        torch.testing.assert_close(value, expected[name], equal_nan=True, msg=name)
    whole.fit(z, group=None)
    parts.fit(own(z, split))
    for ours, expected_shape in zip(parts.shapes, whole.shapes, strict=True):
        assert torch.equal(ours, expected_shape)
    with pytest.raises(ValueError, match="in one process of the group at least"):
        parts.fit(z[:0])
    with pytest.raises(ValueError, match="at least 5 latents"):
        parts.init_from(z[:1])


def a_chosen_group() -> None:
    """Modules work together in training and alone in eval. Copies share a ProcessGroup, pickles use the default."""
    scores = spread(dist.get_rank(), 8, K)
    together, alone = sinkhorn(scores, group=dist.group.WORLD), sinkhorn(scores)
    assert not torch.allclose(together, alone, atol=1e-3)
    assigner = SinkhornAssigner(group=dist.new_group())
    for copied in (copy.deepcopy(assigner), pickle.loads(pickle.dumps(assigner)), SinkhornAssigner()):
        assert torch.equal(copied(scores), together)
        assert torch.equal(copied.eval()(scores), alone)
    assert torch.equal(SinkhornAssigner(group=None)(scores), alone)
    for build in (PrototypicalRegularizer, PrototypicalRegularizer.paper):
        ranks = [module.ranks.group for module in build(DIM, K, group=None).modules() if hasattr(module, "ranks")]
        assert ranks == [None] * 5  # the layer, assigner, mmd, usage and follower
    only_me = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    assert torch.equal(sinkhorn(scores, group=only_me), alone)
    for wrong, error in ((7, TypeError), ("world", ValueError)):
        with pytest.raises(error, match="group: expected"):
            AnchoredMMDLoss(group=wrong)


def functions() -> None:
    sinkhorn_of_the_global_batch()
    bad_rows_of_the_global_batch()
    cross_entropy_of_the_global_batch()
    mmd_of_the_global_batch()
    metrics_and_initialisation()
    a_chosen_group()


# ----------------------------------------------------------------------------------------------------------- layer


class Autoencoder(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, DIM), nn.Linear(DIM, 12)
        warm = {"schedule": Schedule(warmup_steps=1, mmd_steps=1)}
        self.regularizer = PrototypicalRegularizer(DIM, K, **(warm | options))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, info = self.regularizer(self.encoder(x), mask)
        return self.decoder(z), info.loss


def built(**options) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(**options)


def train(model: nn.Module, batches: list[Tensor], masks: list[Tensor | None], weighted: bool) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for x, mask in zip(batches, masks, strict=True):
        optimizer.zero_grad()
        y, loss = model(x, mask)
        ((y - x).square().mean() + (loss if weighted else 0)).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def one_against_two(weighted: bool = False, masked: bool = False, **options) -> None:
    """Take a few optimizer steps on batches of 32 + 32: with two processes under DDP, and with this one alone."""
    options |= {"mode": "weighted"} if weighted else {}
    batches = list(spread(5, 5, 64, 12).abs())
    masks = [spread(i, 64) > -1 if masked else None for i in range(5)]
    components, ddp = options.pop("components", lambda group: {}), options.pop("ddp", {})
    whole = built(group=None, **components(None), **options)
    expected = train(whole, batches, masks, weighted)
    model = built(**components("default"), **options)
    parts = [own(x, (32, 32)) for x in batches]
    part_masks = [mask if mask is None else own(mask, (32, 32)) for mask in masks]
    losses = train(DistributedDataParallel(model, **ddp), parts, part_masks, weighted)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    for name, value in whole.named_buffers():
        if name.endswith("marginals"):
            torch.testing.assert_close(dict(model.named_buffers())[name], value, atol=1e-6, rtol=0)
    start = built(group=None, **components(None), **options)
    for (name, value), first in zip(whole.named_parameters(), start.parameters(), strict=True):
        assert not torch.equal(value, first), name
        torch.testing.assert_close(dict(model.named_parameters())[name], value, atol=1e-5, rtol=1e-5, msg=name)
    stay_equal(model)


def few(group: str | None) -> dict:
    return {"mmd": AnchoredMMDLoss(max_tokens=24, group=group)}


def adaptive(group: str | None) -> SinkhornAssigner:
    return SinkhornAssigner(marginals="adaptive", num_prototypes=K, group=group)


def stay_equal(model: nn.Module) -> None:
    """Check that every entry of the state is equal on both ranks, bit for bit. Each rank keeps its own last latents."""
    for name, value in model.state_dict().items():
        if "clusters.recent" in name:
            continue
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value.contiguous())
        assert torch.equal(*both), name


def layer() -> None:
    exchanges()
    compiled()
    for limit in (regularizer.GATHERED, 0):  # each process computes small batches as a whole, or they exchange sums
        regularizer.GATHERED = limit
        one_against_two()
        one_against_two(masked=True, components=few)
        for weighted in (False, True):
            one_against_two(weighted, components=lambda group: {"assigner": adaptive(group)})
        an_uneven_end()
        an_empty_rank()
    # With a bucket for each parameter, DDP has all-reduces before and after the layer's own in the backward pass.
    one_against_two(ddp={"bucket_cap_mb": 1e-5, "gradient_as_bucket_view": True})
    one_against_two(weighted=True, components=few)
    one_against_two(components=lambda group: {"mmd": AnchoredMMDLoss(features=30, max_tokens=24, group=group)})
    algorithm_1()
    compiled()


def an_uneven_end() -> None:
    """No process hangs at a last batch of 32 + 7 or of 32 + 0."""
    for last in ((32, 7), (32, 0)):
        model = built(mmd=AnchoredMMDLoss(max_tokens=24))
        x = spread(dist.get_rank(), 3, 32, 12)
        batches = [x[0], x[1], x[2][: last[dist.get_rank()]]]
        train(DistributedDataParallel(model), batches, [None] * 3, False)
        stay_equal(model)


def an_empty_rank() -> None:
    """One rank has no rows. The other rank's latents get the same gradients as in one process."""
    for options in ({}, {"layout": "b d h w"}):
        layer, alone = (
            PrototypicalRegularizer(DIM, K, group=group, **options, **(few(group) if options else {}))
            for group in ("default", None)
        )
        z = spread(1, *((8, DIM, 2, 3) if options else (48, DIM))).requires_grad_()
        dist.broadcast(layer.head.prototypes.data, 0)
        alone.head.load_state_dict(layer.head.state_dict())
        mine = (z if dist.get_rank() else z[:0]).detach().clone().requires_grad_()
        out, info = layer(mine)
        (out * torch.arange(len(out)).reshape(-1, *[1] * (out.ndim - 1))).sum().backward()
        assert info.scores.shape[0] == len(mine) and mine.grad.shape == mine.shape
        if dist.get_rank():
            out, expected = alone(z)
            (out * torch.arange(len(out)).reshape(-1, *[1] * (out.ndim - 1))).sum().backward()
            torch.testing.assert_close(info.loss, expected.loss, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mine.grad, z.grad, atol=1e-4, rtol=1e-5)
        layer.eval()(mine) if dist.get_rank() else None  # alone in eval: nobody waits
    with pytest.raises(ValueError, match="in one process of the group at least"):
        layer.train()(z[:0])


class Exchanges(TorchDispatchMode):
    """Counts the collectives of a process."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += str(function).startswith("c10d")
        return function(*args, **(kwargs or {}))


def exchanges() -> None:
    """A step exchanges the rows with their counts, and then the norm. A share larger than all before it adds a third.

    Every rank counts the whole batch, bit for bit as one process does. A copy starts anew on all ranks.
    """
    layer, alone = (PrototypicalRegularizer(DIM, K, group=group) for group in ("default", None))
    dist.broadcast(layer.head.prototypes.data, 0)
    alone.load_state_dict(layer.state_dict())
    shares = [(16, 16), (16, 16), (7, 16), (0, 12), (20, 1), (1, 20), (20, 20)]
    expected = [3, 2, 2, 2, 3, 2, 2]
    for i, (split, number) in enumerate(zip(shares, expected, strict=True)):
        z = spread(i, sum(split), DIM)
        masked = i in (2, 4)  # only the second rank leaves rows out
        mask = torch.cat([torch.ones(split[0], dtype=torch.bool), spread(9, split[1]) > 0]) if masked else None
        part = own(mask, split) if masked and dist.get_rank() else None
        with Exchanges() as seen:
            out, _ = layer(own(z, split).clone().requires_grad_(), part)
            out.sum().backward()
        assert seen.count == number, (i, seen.count)
        alone(z.requires_grad_(), mask)
        for name, value in alone.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), name
    stay_equal(layer)
    for number in (3, 2):
        layer = copy.deepcopy(layer) if number == 3 else layer
        with Exchanges() as seen:
            layer(own(z, (20, 20)).detach().requires_grad_())[0].sum().backward()
        assert seen.count == number


def compiled() -> None:
    """Both passes trace the collectives. The graph breaks only at the count of rows."""
    z, anchors, assignments = spread(dist.get_rank(), 16, DIM), spread(9, K, DIM), torch.arange(16) % K
    for function in (
        lambda z: SinkhornAssigner().cross_entropy_and_gradient(z, 0.1),
        lambda z: AnchoredMMDLoss(features=12).value_and_gradient(z, anchors, assignments),
    ):
        traced = torch.compile(function, fullgraph=True, backend="aot_eager")(z)
        for value, expected in zip(traced, function(z), strict=True):
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    loss = AnchoredMMDLoss(features=12)
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        function(mine := z.clone().requires_grad_(), anchors, assignments).backward()
        torch.testing.assert_close(mine.grad, loss.value_and_gradient(z, anchors, assignments)[1])
    x = [spread(dist.get_rank(), 16, 12)]
    eager, model = (built(schedule=Schedule(mmd_steps=0)) for _ in range(2))
    train(eager, x * 2, [None] * 2, False)
    train(torch.compile(model, backend="aot_eager"), x * 2, [None] * 2, False)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-5, rtol=1e-5, msg=name)


def sharded() -> None:
    """Under FSDP2 the layer computes the same as under DDP, and it is equal on all ranks.

    It is in a shard of its own or in its parent's shard.
    """
    mesh = init_device_mesh("cpu", (2,))
    x = [own(spread(5, 64, 12).abs(), (32, 32))] * 4
    for options, apart in (({}, False), ({"mode": "weighted"}, True), ({"follow_rate": 0.0}, False)):
        weighted = "mode" in options
        model, plain = built(**options), built(**options)
        if apart:
            fully_shard(model.regularizer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.regularizer.head.init_from(spread(dist.get_rank(), 20, DIM), torch.Generator().manual_seed(1))
        plain.regularizer.head.init_from(spread(dist.get_rank(), 20, DIM), torch.Generator().manual_seed(1))
        train(model, x, [None] * 4, weighted)
        train(DistributedDataParallel(plain), x, [None] * 4, weighted)
        for name, value in model.named_parameters():
            torch.testing.assert_close(value.full_tensor(), plain.get_parameter(name), atol=1e-6, rtol=1e-5, msg=name)
        stay_equal(model)


def data(rank: int) -> Tensor:
    return torch.rand(5, 32, 12, generator=torch.Generator().manual_seed(rank))


def algorithm_1() -> None:
    model = built()
    training = PrototypicalTraining(
        model.encoder, model.decoder, model.regularizer, warmup_epochs=0, reconstruction=nn.functional.mse_loss
    )
    start = copy.deepcopy(model.state_dict())
    for x in data(dist.get_rank()):
        training.step(x)
    assert all(not torch.equal(start[name], value) for name, value in model.named_parameters())
    stay_equal(model)


def lifecycle() -> None:
    """Usage, queue and revival use the latents of all ranks. Past latents are balanced once, not once for each rank."""
    layer = PrototypicalRegularizer(DIM, K, queue=LatentQueue(40, DIM))
    dist.broadcast(layer.head.prototypes.data, 0)
    layer.head.prototypes.data.abs_()[3] *= -1
    alone = PrototypicalRegularizer(DIM, K, queue=LatentQueue(40, DIM, group=None), group=None)
    alone.load_state_dict(layer.state_dict())
    sizes = ((16, 7), (9, 20), (12, 0))
    batches = [1 + spread(i, sum(counts), DIM) for i, counts in enumerate(sizes)]
    wrapped = DistributedDataParallel(layer)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (layer, alone)]
    for batch, counts in zip(batches, sizes, strict=True):
        for model, z in ((wrapped, own(batch, counts)), (alone, batch)):
            scale = 2 if model is wrapped else 1  # DistributedDataParallel takes the mean over two
            (model(z.clone().requires_grad_())[0].sum() * scale).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(layer.head.prototypes, alone.head.prototypes, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer.queue.latents, alone.queue.latents) and torch.equal(layer.meter.counts, alone.meter.counts)
    order = torch.cat(batches)
    assert torch.equal(layer.queue.latents.roll(-int(layer.queue.position), 0), order[-40:])
    torch.testing.assert_close(layer.metrics(), alone.metrics(), atol=1e-5, rtol=1e-5)
    # Only rank 1 has too few latents. No rank goes on alone.
    with pytest.raises(ValueError, match="finite latents, one for each prototype"):
        layer.revive(torch.full((9, DIM), torch.nan if dist.get_rank() else 1.0))
    assert layer.revive(spread(dist.get_rank(), 9, DIM)).tolist() == [3]
    stay_equal(layer)
    switched_off()


def switched_off() -> None:
    """With weights of 0 the prototypes get no gradient. DistributedDataParallel does not wait for one."""
    model = built(prototype_weight=0.0, mmd_weight=0.0)
    train(DistributedDataParallel(model), list(data(dist.get_rank())), [None] * 5, False)
    stay_equal(model)


def worker(rank: int, store: str, check: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        check()
        gc.collect()  # reference cycles that hold the group must not outlive it
        dist.barrier()  # no rank destroys the group while another one still sends
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("check", [functions, layer, lifecycle, sharded], ids=lambda check: check.__name__)
def test_two_processes(check: Callable[[], None], tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path / "store"), check), nprocs=2)
