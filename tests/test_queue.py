"""Past latents: the content of the queue, and its effect on the assignment and the MMD."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import log_sinkhorn

from proto_reg import AnchoredMMDLoss, LatentQueue, PrototypicalRegularizer, SinkhornAssigner
from proto_reg.functional import prototype_cross_entropy

DIM, K, BATCH = 8, 4, 12


def test_it_holds_the_last_latents_whatever_the_batches() -> None:
    size = 7
    queue, past = LatentQueue(size, 2), []
    for count in (3, 1, 20, 7, 6, 2, 9):
        z, counted = torch.randn(count, 2), torch.rand(count) > 0.3
        z[torch.rand(count) > 0.9] = torch.nan
        queue.push(z, counted)
        usable = counted & z.isfinite().all(1)
        past = (past + z[usable].tolist())[-size:]
        assert int(queue.filled) == int(queue.in_use.sum()) == len(past)
        # Start with the oldest latent. In a full queue, the next latent goes to its slot.
        oldest = int(queue.position) if len(past) == size else 0
        held = queue.latents[: len(past)].roll(-oldest, 0)
        assert torch.equal(held, torch.tensor(past).reshape(-1, 2))


def test_a_batch_without_latents_changes_nothing() -> None:
    queue = LatentQueue(4, 2)
    queue.push(torch.randn(3, 2))
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    queue.push(torch.randn(3, 2), torch.zeros(3, dtype=torch.bool))
    queue.push(torch.full((3, 2), torch.inf))
    queue.push(torch.randn(0, 2))
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())


def test_no_slot_counts_before_it_is_filled() -> None:
    plain = PrototypicalRegularizer(DIM, K)
    queued = PrototypicalRegularizer(DIM, K, queue=LatentQueue(64, DIM), head=plain.head)
    z = torch.randn(BATCH, DIM)
    results = []
    for layer in (plain, queued):
        leaf = z.clone().requires_grad_()
        out, info = layer(leaf)
        out.sum().backward()
        results.append((leaf.grad, info.codes, info.prototype_loss, info.mmd_loss))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("masked", [False, True])
def test_the_past_enters_the_balance_and_not_the_loss(masked: bool) -> None:
    layer = PrototypicalRegularizer(DIM, K, queue=LatentQueue(20, DIM)).double()
    past, z = torch.randn(20, DIM), torch.randn(BATCH, DIM, dtype=torch.float64)
    layer.queue.push(past)
    mask = torch.rand(BATCH) > 0.3 if masked else None
    info = layer.losses(z, mask)
    kept = torch.ones(BATCH, dtype=torch.bool) if mask is None else mask
    scores = layer.head(torch.cat([z[kept], layer.queue.latents]))
    codes = log_sinkhorn(scores.detach(), 0.05, 3)[: int(kept.sum())]
    torch.testing.assert_close(info.codes[kept], codes)
    torch.testing.assert_close(info.prototype_loss, prototype_cross_entropy(scores[: len(codes)], codes, 0.1))
    assert info.scores.shape == info.codes.shape == (BATCH, K)
    assert info.assignments.shape == (BATCH,)


def test_the_balanced_gradient_with_a_queue_is_that_of_the_losses() -> None:
    layer = PrototypicalRegularizer(DIM, K, queue=LatentQueue(20, DIM)).double()
    layer.queue.push(torch.randn(20, DIM))
    z, g = torch.randn(2, BATCH, DIM, dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    g_p, by_v = torch.autograd.grad(layer.losses(leaf).prototype_loss, [leaf, layer.head.prototypes])
    (g_r,) = torch.autograd.grad(layer.losses(leaf).mmd_loss, leaf)
    out, _ = layer(leaf)
    (out * g).sum().backward()
    by_prototypes = layer.prototype_weight * g.norm() / g_p.norm()
    torch.testing.assert_close(leaf.grad, g + by_prototypes * g_p + layer.mmd_weight * g.norm() / g_r.norm() * g_r)
    torch.testing.assert_close(layer.head.prototypes.grad, by_prototypes * by_v)


@pytest.mark.parametrize("options", [{"mmd": AnchoredMMDLoss(max_tokens=6)}, {"layout": "b d h w"}], ids=str)
def test_it_goes_with_the_other_options(options: dict) -> None:
    layer = PrototypicalRegularizer(DIM, K, queue=LatentQueue(30, DIM), **options)
    shape = (3, DIM, 2, 2) if "layout" in options else (BATCH, DIM)
    for _ in range(4):
        z = torch.randn(shape, requires_grad=True)
        out, info = layer(z)
        out.square().sum().backward()
        assert z.grad.isfinite().all()
        assert info.mmd_loss.isfinite()
    assert int(layer.queue.filled) == 30


def test_an_assigner_of_ones_own_sees_the_past() -> None:
    class Nearest(SinkhornAssigner):
        rows: int

        def forward(self, scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            self.rows = int(mask.sum())
            return torch.nn.functional.one_hot(scores.argmax(1), K).to(scores.dtype)

    layer = PrototypicalRegularizer(DIM, K, queue=LatentQueue(10, DIM), assigner=Nearest())
    for rows in (BATCH, BATCH + 10):
        layer(torch.randn(BATCH, DIM, requires_grad=True))
        assert layer.assigner.rows == rows


def test_eval_and_untracked_passes_leave_it_alone() -> None:
    layer = PrototypicalRegularizer(DIM, K, queue=LatentQueue(10, DIM))
    layer.eval()(torch.randn(BATCH, DIM))
    layer.train()
    layer.tracking = False
    layer(torch.randn(BATCH, DIM, requires_grad=True))
    assert int(layer.queue.filled) == 0


@pytest.mark.parametrize(
    ("queue", "words"),
    [
        (lambda: LatentQueue(0, DIM), "size: expected an int >= 1"),
        (lambda: LatentQueue(10, 0), "latent_dim: expected an int >= 1"),
        (lambda: LatentQueue(10, DIM + 1), f"queue: expected latent_dim={DIM}, got {DIM + 1}"),
        (lambda: 512, "queue: expected a LatentQueue, got int"),
    ],
)
def test_a_queue_that_does_not_fit(queue: Callable[[], LatentQueue], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        PrototypicalRegularizer(DIM, K, queue=queue())
