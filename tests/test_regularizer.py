"""The layer: its effect on a gradient, and all the inputs and uses that it must survive."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import tempfile

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import proto_reg
from proto_reg import AnchoredMMDLoss, LatentQueue, PrototypicalRegularizer, Schedule, SinkhornAssigner

DIM, K, BATCH = 16, 5, 48


def expected_gradients(layer: PrototypicalRegularizer, z: torch.Tensor, g: torch.Tensor, mask=None):
    """g + lambda_p |g|/|g_p| g_p + lambda_r |g|/|g_r| g_r, and the gradient at the prototypes.

    Separate autograd passes compute the two parts.
    """
    leaf = z.detach().clone().requires_grad_()
    g_p, by_prototypes = torch.autograd.grad(layer.losses(leaf, mask).prototype_loss, [leaf, layer.head.prototypes])
    (g_r,) = torch.autograd.grad(layer.losses(leaf, mask).mmd_loss, leaf)
    kept = g if mask is None else g * mask.unsqueeze(layer.layout.latent_axis)
    factor_p = layer.prototype_weight * kept.norm() / g_p.norm()
    factor_r = layer.mmd_weight * kept.norm() / g_r.norm()
    return g + factor_p * g_p + factor_r * g_r, factor_p * by_prototypes


def run(layer: PrototypicalRegularizer, z: torch.Tensor, weight: torch.Tensor, scale: float = 1.0, mask=None):
    """The gradient at z and the info, for the loss scale * <weight, z>, whose gradient is scale * weight."""
    leaf = z.clone().requires_grad_()
    out, info = layer(leaf, mask)
    assert torch.equal(out, z)
    (scale * weight * out).sum().backward()
    return leaf.grad, info


LAYOUTS = {"b d": (BATCH, DIM), "b n d": (6, 8, DIM), "b d h w": (3, DIM, 4, 4), "b d t h w": (2, DIM, 2, 3, 4)}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scores", ["cosine", "dot", "euclidean"])
def test_balanced_gradient_is_what_it_says(scores: str, layout: str, masked: bool) -> None:
    head = proto_reg.PrototypeHead(DIM, K, similarity=scores)
    layer = PrototypicalRegularizer(DIM, K, head=head, layout=layout, prototype_weight=0.3, mmd_weight=0.2).double()
    z = torch.randn(LAYOUTS[layout], dtype=torch.float64)
    g = torch.randn_like(z)
    positions = [size for size, axis in zip(z.shape, layout.split(), strict=True) if axis != "d"]
    mask = torch.rand(positions) > 0.3 if masked else None
    by_z, by_prototypes = expected_gradients(layer, z, g, mask)
    gradient, info = run(layer, z, g, mask=mask)
    torch.testing.assert_close(gradient, by_z, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(head.prototypes.grad, by_prototypes, rtol=1e-9, atol=1e-12)
    assert info.assignments.shape == torch.Size(positions)
    assert info.scores.shape == info.codes.shape
    assert info.scores.shape[layout.split().index("d")] == K
    assert not info.loss.requires_grad


@pytest.mark.parametrize("scale", [1024.0, 1 / 1024])
def test_loss_scaling_passes_through(scale: float) -> None:
    layer = PrototypicalRegularizer(DIM, K).double()
    z, g = torch.randn(2, BATCH, DIM, dtype=torch.float64)
    plain, _ = run(layer, z, g)
    prototypes = layer.head.prototypes.grad.clone()
    layer.zero_grad()
    scaled, _ = run(layer, z, g, scale)
    torch.testing.assert_close(scaled, scale * plain)
    torch.testing.assert_close(layer.head.prototypes.grad, scale * prototypes)


def test_half_precision_under_a_gradient_scaler() -> None:
    """The norm of the gradients is too large for float16. The gradients still arrive scaled and finite."""
    layer = PrototypicalRegularizer(DIM, K)
    z, g = torch.randn(2, BATCH, DIM)
    z, g = z.half(), 5000 * g.half()
    by_z, _ = expected_gradients(layer, z.float(), g.float())
    gradient, _ = run(layer, z, g)
    assert gradient.dtype == torch.float16
    assert g.norm().isinf()
    torch.testing.assert_close(gradient.float(), by_z, rtol=2e-3, atol=10)
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model = nn.Linear(DIM, DIM)
        z, info = layer(model(torch.randn(BATCH, DIM)))
        assert z.dtype == torch.bfloat16
        assert info.loss.dtype == torch.float32
        z.float().square().mean().backward()
    assert model.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_converted_layer_takes_float32_latents(dtype: torch.dtype) -> None:
    layer = PrototypicalRegularizer(DIM, K).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for latents in (torch.float32, dtype):
        z = torch.randn(BATCH, DIM).to(latents).requires_grad_()
        out, info = layer(z)
        assert (out.dtype, layer.head.prototypes.dtype) == (latents, dtype)
        assert info.loss.isfinite()
        out.sum().backward()
        assert z.grad.isfinite().all()
        assert layer.head.prototypes.grad.isfinite().all()
        optimizer.step()


def test_accumulation_adds_up_and_a_fresh_forward_can_go_back_again() -> None:
    layer = PrototypicalRegularizer(DIM, K).double()
    parts = torch.randn(3, BATCH, DIM, dtype=torch.float64)
    g = torch.randn_like(parts)
    expected = [expected_gradients(layer, z, weight) for z, weight in zip(parts, g, strict=True)]
    for z, weight, (by_z, _) in zip(parts, g, expected, strict=True):
        gradient, _ = run(layer, z, weight)
        torch.testing.assert_close(gradient, by_z)
    torch.testing.assert_close(layer.head.prototypes.grad, sum(by_v for _, by_v in expected))


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_two_backward_passes_through_one_forward_are_scaled_by_their_own_norms(mode: str) -> None:
    """This holds in balanced mode, as documented. In weighted mode the gradients are those of the sum."""
    layer = PrototypicalRegularizer(DIM, K, mode=mode, follow_rate=0.0).double()
    z, a, b = torch.randn(3, BATCH, DIM, dtype=torch.float64)

    def gradient(*weights: torch.Tensor) -> list[torch.Tensor]:
        layer.zero_grad()
        leaf = z.clone().requires_grad_()
        out, info = layer(leaf)
        losses = [(out * weight).sum() for weight in weights]
        losses[0] = losses[0] + (info.loss if mode == "weighted" else 0.0)
        for loss in losses:
            loss.backward(retain_graph=True)
        return [leaf.grad, layer.head.prototypes.grad.clone()]

    once, twice = gradient(a + b), gradient(a, b)
    if mode == "balanced":
        direction = (once[0] - (a + b)) / (a + b).norm()
        factor = a.norm() + b.norm()
        expected = [a + b + factor * direction, factor / (a + b).norm() * once[1]]
        assert factor > 1.3 * (a + b).norm()
    else:
        expected = once
    for ours, theirs in zip(twice, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
def test_all_forwards_before_any_backward() -> None:
    layer = PrototypicalRegularizer(DIM, K).double()
    parts = torch.randn(2, BATCH, DIM, dtype=torch.float64).requires_grad_()
    g = torch.randn_like(parts)
    expected = [expected_gradients(layer, z, weight)[0] for z, weight in zip(parts, g, strict=True)]
    outputs = torch.stack([layer(z)[0] for z in parts])
    (outputs * g).sum().backward()
    torch.testing.assert_close(parts.grad, torch.stack(expected))


def test_summed_and_mean_losses_give_the_same_direction() -> None:
    layer = PrototypicalRegularizer(DIM, K).double()
    x = torch.randn(BATCH, DIM, dtype=torch.float64)
    directions = []
    for reduce in (torch.sum, torch.mean):
        leaf = x.clone().requires_grad_()
        reduce((layer(leaf)[0] - 1).square()).backward()
        directions.append(leaf.grad / leaf.grad.norm())
    torch.testing.assert_close(*directions)


def test_eval_no_grad_and_warm_up_are_the_identity() -> None:
    z = torch.randn(BATCH, DIM, requires_grad=True)
    layer = PrototypicalRegularizer(DIM, K, schedule=Schedule(warmup_steps=2))
    g = torch.randn(BATCH, DIM)
    assert layer.eval()(z)[0] is z
    layer.train()
    with torch.no_grad():
        assert layer(z)[0] is z
    assert layer.steps == 0
    for step in range(4):
        gradient, info = run(layer, z.detach(), g)
        assert torch.equal(gradient, g) == (step < 2)
        assert (info.loss == 0) == (step < 2)
        assert layer.head.prototypes.grad.any() == (step >= 2)


def test_eval_assigns_by_scores_and_still_reports_losses() -> None:
    layer = PrototypicalRegularizer(DIM, K).eval()
    z = torch.randn(BATCH, DIM)
    _, info = layer(z)
    assert torch.equal(info.assignments, info.scores.argmax(1))
    assert info.prototype_loss > 0
    assert not info.loss.requires_grad


def test_weighted_mode_is_the_classic_form() -> None:
    layer = PrototypicalRegularizer(
        DIM, K, mode="weighted", prototype_weight=0.7, mmd_weight=0.4, schedule=Schedule(warmup_steps=1)
    )
    z = torch.randn(BATCH, DIM, requires_grad=True)
    out, info = layer(z)
    assert out is z
    assert info.loss == 0
    _, info = layer(z)
    torch.testing.assert_close(info.loss, 0.7 * info.prototype_loss + 0.4 * info.mmd_loss)
    info.loss.backward()
    losses = layer.losses(leaf := z.detach().clone().requires_grad_())
    expected = torch.autograd.grad(0.7 * losses.prototype_loss + 0.4 * losses.mmd_loss, [leaf, layer.head.prototypes])
    torch.testing.assert_close(z.grad, expected[0])
    torch.testing.assert_close(layer.head.prototypes.grad, expected[1])


def test_mmd_leaves_prototypes_alone() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    loss = layer.losses(torch.randn(BATCH, DIM, requires_grad=True)).mmd_loss
    assert torch.autograd.grad(loss, layer.head.prototypes, allow_unused=True)[0] is None


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
def test_a_single_prototype_follows_its_latents_without_a_gradient(rate: float) -> None:
    layer = PrototypicalRegularizer(DIM, 1, follow_rate=rate)
    encoder = nn.Linear(DIM, DIM)
    optimizer = torch.optim.Adam([*encoder.parameters(), *layer.parameters()], lr=0.1)
    before = layer.head.prototypes.detach().clone()
    for _ in range(20):
        z, info = layer(encoder(torch.randn(BATCH, DIM)) + 3)
        optimizer.zero_grad()
        z.square().mean().backward()
        assert not layer.head.prototypes.grad.any()
        optimizer.step()
        assert info.prototype_loss == 0
    if rate:
        assert (layer.head.prototypes - z.mean(0)).norm() < 0.2 * (before - z.mean(0)).norm()
    else:
        assert torch.equal(layer.head.prototypes, before)


def test_a_frozen_single_prototype_stays_where_it_is() -> None:
    layer = PrototypicalRegularizer(DIM, 1, follow_rate=0.5)
    layer.head.prototypes.requires_grad_(False)
    before = layer.head.prototypes.clone()
    for _ in range(3):
        layer(torch.randn(BATCH, DIM, requires_grad=True) + 3)
    assert torch.equal(layer.head.prototypes, before)


def test_prototypes_follow_their_latents_once_an_optimizer_moved_them() -> None:
    layer = PrototypicalRegularizer(DIM, K, follow_rate=0.25)
    v = layer.head.prototypes
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    z = torch.randn(BATCH, DIM, requires_grad=True)
    start = v.detach().clone()
    assignments = []
    for _ in range(2):  # accumulation: both batches count, and no batch moves a prototype
        out, info = layer(z)
        out.sum().backward()
        assignments.append(info.assignments)
        assert torch.equal(v, start)
    optimizer.step()
    stepped = v.detach().clone()
    layer(z)
    typical = stepped.clone()
    for k in range(K):
        members = torch.cat([z[a == k] for a in assignments]).detach()
        if len(members):
            weights = (1 + (members - start[k]).square().mean(1)) ** -2
            typical[k] = (weights[:, None] * members).sum(0) / weights.sum()
    torch.testing.assert_close(v, stepped + 0.25 * (typical - stepped))


@pytest.mark.parametrize(
    ("prototypes", "options"),
    [(K, {"schedule": Schedule(warmup_steps=99)}), (K, {"prototype_weight": 0.0}), (K, {"follow_rate": 0.0})],
)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_what_holds_prototypes_still_holds_them_still(prototypes: int, options: dict, decay: float) -> None:
    """Only the optimizer moves them. It uses its gradient, or only weight decay if there is no gradient."""
    layer = PrototypicalRegularizer(DIM, prototypes, **options)
    v = layer.head.prototypes
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=decay)
    for _ in range(3):
        layer(3 + torch.randn(BATCH, DIM, requires_grad=True))[0].sum().backward()
        before = v.detach().clone()
        gradient = v.grad.clone()
        assert gradient.any() == ("follow_rate" in options)
        optimizer.step()
        layer(torch.randn(BATCH, DIM, requires_grad=True))
        torch.testing.assert_close(v, before - 0.1 * (gradient + decay * before))
        optimizer.zero_grad()


def test_frozen_prototypes_stay() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    layer.head.requires_grad_(False)
    before = layer.head.prototypes.clone()
    for _ in range(3):
        layer(torch.randn(BATCH, DIM, requires_grad=True))[0].sum().backward()
    assert torch.equal(layer.head.prototypes, before)
    assert layer.head.prototypes.grad is None


def test_max_tokens_takes_a_seeded_subsample_and_leaves_the_random_stream_alone() -> None:
    def gradients(seed: int, steps: int) -> torch.Tensor:
        torch.manual_seed(0)
        layer = PrototypicalRegularizer(
            DIM, K, mmd=AnchoredMMDLoss(max_tokens=32, seed=seed), prototype_weight=0.0, mmd_weight=1.0
        )
        z, g = torch.randn(2, 200, DIM)
        state = torch.get_rng_state()
        for _ in range(steps):
            gradient, _ = run(layer, z, g)
        assert torch.equal(torch.get_rng_state(), state)
        return gradient - g

    first = gradients(0, 1)
    touched = first.abs().sum(1) > 0
    assert 0 < touched.sum() <= 32
    assert torch.equal(first, gradients(0, 1))
    assert not torch.equal(touched, gradients(0, 2).abs().sum(1) > 0)
    assert not torch.equal(touched, gradients(1, 1).abs().sum(1) > 0)


def test_subsample_prefers_positions_that_count() -> None:
    layer = PrototypicalRegularizer(DIM, K, mmd=AnchoredMMDLoss(max_tokens=32), prototype_weight=0.0)
    z, g = torch.randn(2, 200, DIM)
    mask = torch.zeros(200, dtype=torch.bool)
    mask[:40] = True
    gradient, _ = run(layer, z, g, mask=mask)
    assert torch.equal(gradient[40:], g[40:])
    assert ((gradient - g)[:40].abs().sum(1) > 0).sum() > 16


def test_isolated_rows_reach_nothing() -> None:
    layer = PrototypicalRegularizer(DIM, K, assigner=SinkhornAssigner(nan_policy="isolate"))
    z, g = torch.randn(2, BATCH, DIM)
    z[7] = torch.nan
    leaf = z.clone().requires_grad_()
    out, info = layer(leaf)
    (out.nan_to_num() * g).sum().backward()
    others = torch.arange(BATCH) != 7
    by_z, by_v = expected_gradients(PrototypicalRegularizer(DIM, K, head=layer.head), z[others], g[others])
    torch.testing.assert_close(leaf.grad[others], by_z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.head.prototypes.grad, by_v, rtol=1e-4, atol=1e-5)
    assert info.loss.isfinite()


def test_a_failing_call_changes_nothing() -> None:
    layer = PrototypicalRegularizer(DIM, K, assigner=SinkhornAssigner(nan_policy="raise"))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(torch.randn(BATCH, DIM, requires_grad=True))[0].sum().backward()
    optimizer.step()  # after this, the next forward would move the prototypes
    before = copy.deepcopy(layer.state_dict())
    for bad in (
        torch.full((BATCH, DIM), torch.nan),
        torch.randn(BATCH, DIM + 1),
        torch.randn(BATCH, DIM, 1),
        torch.randn(0, DIM),
    ):
        with pytest.raises(ValueError, match="z: expected"):
            layer(bad)
    with pytest.raises(TypeError, match="z: expected a floating-point"):
        layer(torch.ones(BATCH, DIM, dtype=torch.int64))
    with pytest.raises(TypeError, match="mask: expected a boolean"):
        layer(torch.randn(BATCH, DIM), torch.ones(BATCH))
    with pytest.raises(ValueError, match="mask: expected shape"):
        layer(torch.randn(BATCH, DIM), torch.ones(BATCH + 1, dtype=torch.bool))
    assert torch.is_grad_enabled()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["b d", "b d h w"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": Schedule(warmup_steps=2)},
        {"mode": "weighted"},
        {"mmd": AnchoredMMDLoss(max_tokens=24)},
    ],
    ids=str,
)
def test_compiles_as_one_graph_forward_and_backward(layout: str, options: dict) -> None:
    torch._dynamo.reset()
    eager = PrototypicalRegularizer(DIM, K, layout=layout, **options)
    inside = copy.deepcopy(eager)
    compiled = torch.compile(inside, fullgraph=True)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.5) for layer in (eager, inside)]
    for _ in range(4):
        z, g = torch.randn(2, *LAYOUTS[layout])
        results = []
        for call, layer, optimizer in zip((eager, compiled), (eager, inside), optimizers, strict=True):
            leaf = z.clone().requires_grad_()
            out, info = call(leaf)
            ((out * g).sum() + info.loss).backward()
            results.append([leaf.grad, layer.head.prototypes.grad.clone(), info.loss.detach()])
            optimizer.step()
            optimizer.zero_grad()
            results[-1] += [value.clone() for value in layer.state_dict().values()]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_deepcopy_pickle_and_weights_only_checkpoints() -> None:
    layer = PrototypicalRegularizer(DIM, K, assigner=SinkhornAssigner(marginals=[0.2] * 5))
    z, g = torch.randn(2, BATCH, DIM)
    run(layer, z, g)
    layer.zero_grad()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = PrototypicalRegularizer(DIM, K, assigner=SinkhornAssigner(marginals=[0.2] * 5))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    expected, _ = run(copy.deepcopy(layer), z, g)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), loaded):
        assert torch.equal(run(twin, z, g)[0], expected)


def train(
    model: nn.Module, layer: PrototypicalRegularizer, optimizer: torch.optim.Optimizer, data: torch.Tensor
) -> None:
    for x in data:
        z, _ = layer(model(x))
        optimizer.zero_grad()
        (z - x).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
def test_exact_resume() -> None:
    def build() -> tuple[nn.Module, PrototypicalRegularizer, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model, layer = (
            nn.Linear(DIM, DIM),
            PrototypicalRegularizer(DIM, K, schedule=Schedule(warmup_steps=2), mmd=AnchoredMMDLoss(max_tokens=16)),
        )
        return model, layer, torch.optim.Adam([*model.parameters(), *layer.parameters()], lr=0.01)

    data = torch.randn(9, BATCH, DIM)
    straight = build()
    train(*straight, data)
    broken = build()
    train(*broken, data[:4])
    with tempfile.TemporaryFile() as file:
        torch.save([part.state_dict() for part in broken], file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
    resumed = build()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(*resumed, data[4:])
    for name, value in straight[1].state_dict().items():
        assert torch.equal(value, resumed[1].state_dict()[name]), name
    assert torch.equal(straight[0].weight, resumed[0].weight)


def two_at_once(layer: PrototypicalRegularizer, call) -> list[torch.Tensor]:
    """The gradients and the state of a training with two forwards before each backward pass."""
    generator, found = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(4):
        latents = [torch.randn(BATCH, DIM, generator=generator).requires_grad_() for _ in range(2)]
        outputs = [call(z) for z in latents]
        optimizer.zero_grad()
        sum(z.square().mean() + (info.loss if layer.mode == "weighted" else 0.0) for z, info in outputs).backward()
        found += [z.grad for z in latents] + [parameter.grad.clone() for parameter in layer.parameters()]
        optimizer.step()
    return [*found, *layer.state_dict().values()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["balanced", "weighted"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mmd": AnchoredMMDLoss(max_tokens=24), "schedule": Schedule(warmup_steps=1, ramp_steps=4)},
        {"queue": LatentQueue(64, DIM), "schedule": Schedule(temperature=(0.3, 0.1), temperature_steps=4)},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The layer was called twice:proto_reg.PrototypeWarning")
def test_two_forwards_before_one_backward(options: dict, mode: str) -> None:
    """The layer runs plain and compiled.

    If it is compiled, the second forward writes to prototypes that the first graph would hold.
    """
    torch._dynamo.reset()
    layer = PrototypicalRegularizer(DIM, K, mode=mode, **options)
    inside = copy.deepcopy(layer)
    expected = two_at_once(layer, layer)
    for ours, theirs in zip(two_at_once(inside, torch.compile(inside, fullgraph=True)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_a_compiled_epoch_with_a_smaller_last_batch(mode: str) -> None:
    torch._dynamo.reset()
    layer = PrototypicalRegularizer(
        DIM, K, mode=mode, mmd=AnchoredMMDLoss(max_tokens=24), queue=LatentQueue(64, DIM), layout="b n d"
    )
    inside = copy.deepcopy(layer)
    trainings = []
    for each, call in ((layer, layer), (inside, torch.compile(inside, fullgraph=True, backend="aot_eager"))):
        generator, found = torch.Generator().manual_seed(1), []
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for rows in (6, 6, 1, 6, 6, 1):
            z = torch.randn(rows, 8, DIM, generator=generator).requires_grad_()
            out, info = call(z)
            optimizer.zero_grad()
            (out.square().mean() + (info.loss if mode == "weighted" else 0.0)).backward()
            optimizer.step()
            found += [z.grad]
        trainings.append([*found, *each.state_dict().values()])
    for ours, theirs in zip(*trainings, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
def test_a_compiled_head_of_ones_own(mode: str) -> None:
    class Scaled(proto_reg.PrototypeHead):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(z)

    torch._dynamo.reset()
    layer = PrototypicalRegularizer(DIM, K, mode=mode, head=Scaled(DIM, K))
    inside, z = copy.deepcopy(layer), torch.randn(BATCH, DIM)
    gradients = []
    for each, call in ((layer, layer), (inside, torch.compile(inside, fullgraph=True, backend="aot_eager"))):
        leaf = z.clone().requires_grad_()
        out, info = call(leaf)
        (out.square().mean() + (info.loss if mode == "weighted" else 0.0)).backward()
        gradients.append([leaf.grad, each.head.prototypes.grad])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_prototypes_may_be_used_beside_the_layer() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    layer(torch.randn(BATCH, DIM, requires_grad=True))
    decoded = nn.Linear(DIM, 3)(layer.head.prototypes).sum()
    z, _ = layer(torch.randn(BATCH, DIM, requires_grad=True))
    (z.sum() + decoded - layer.head.mixture().log_prob(z).mean()).backward()


def test_decoders_may_begin_in_place() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    encoder = nn.Linear(DIM, DIM)
    decoder = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, DIM))
    decoder(layer(encoder(torch.randn(BATCH, DIM)))[0]).sum().backward()
    z, _ = layer(encoder(torch.randn(BATCH, DIM)))
    z += torch.randn(BATCH, DIM)
    z.sum().backward()
    assert encoder.weight.grad.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("which", ["parameter", "view", "encoded"])
def test_what_comes_back_may_be_written_to_and_a_parameter_is_not(which: str, compiled: bool) -> None:
    """The latents are a parameter, as in an auto-decoder, or they are rows of one."""
    torch._dynamo.reset()
    layer = PrototypicalRegularizer(DIM, K)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    latents = nn.Parameter(torch.randn(2 * BATCH, DIM))
    before = latents.detach().clone()
    z = {"parameter": latents, "view": latents[:BATCH].view(BATCH, DIM), "encoded": 1 * latents}[which]
    out, _ = call(z)
    assert torch.equal(out, z)
    out.relu_().sum().backward()
    assert torch.equal(latents, before)
    twin = PrototypicalRegularizer(DIM, K, head=copy.deepcopy(layer.head))
    leaf = before.clone().requires_grad_()
    twin(leaf[: len(z)] * 1)[0].relu().sum().backward()
    torch.testing.assert_close(latents.grad, leaf.grad)


def test_checkpointing_and_saved_tensor_hooks() -> None:
    x = torch.randn(BATCH, DIM)
    gradients = []
    for context in (contextlib.nullcontext(), torch.autograd.graph.save_on_cpu()):
        layer = PrototypicalRegularizer(DIM, K)
        z = x.clone().requires_grad_()
        with context:
            out = torch.utils.checkpoint.checkpoint(lambda z, layer=layer: layer(z)[0], z, use_reentrant=False)
        out.sum().backward()
        gradients.append(z.grad)
        assert layer.head.prototypes.grad.any()


@pytest.mark.parametrize("way", ["mask", "isolate"])
def test_a_loss_that_ignores_the_rows_left_out(way: str) -> None:
    layer = PrototypicalRegularizer(
        DIM, K, assigner=SinkhornAssigner(nan_policy="isolate" if way == "isolate" else "raise")
    )
    z, g = torch.randn(2, BATCH, DIM)
    mask = torch.arange(BATCH) != 7
    bad = torch.where(mask[:, None], z, torch.nan).requires_grad_()
    out, _ = layer(bad, mask if way == "mask" else None)
    (out * g)[mask].sum().backward()
    by_z, by_v = expected_gradients(PrototypicalRegularizer(DIM, K, head=layer.head), z[mask], g[mask])
    torch.testing.assert_close(bad.grad[mask], by_z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.head.prototypes.grad, by_v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["balanced", "weighted"])
@pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")
def test_nothing_counts(mode: str) -> None:
    layer = PrototypicalRegularizer(DIM, K, mode=mode)
    z = torch.randn(BATCH, DIM, requires_grad=True)
    out, info = layer(z, torch.zeros(BATCH, dtype=torch.bool))
    (out.sum() + info.loss).backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    assert not layer.head.prototypes.grad.any()


def test_a_zero_latent_takes_no_more_than_its_share() -> None:
    layer = PrototypicalRegularizer(DIM, K, mmd_weight=0.0)
    z, g = torch.randn(2, BATCH, DIM)
    z[0] = 0
    gradient, _ = run(layer, z, g)
    added = (gradient - g).norm(dim=1)
    assert added[0] < 3 * added[1:].mean() * z.norm(dim=1)[1:].mean()
    assert added[1:].norm() > 0.01 * g.norm()


def test_a_head_of_ones_own_goes_through_autograd() -> None:
    class Scaled(proto_reg.PrototypeHead):
        def __init__(self) -> None:
            super().__init__(DIM, K)
            self.gain = nn.Parameter(torch.tensor(2.0))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.gain * super().forward(z)

    layer = PrototypicalRegularizer(DIM, K, head=Scaled()).double()
    z, g = torch.randn(2, BATCH, DIM, dtype=torch.float64)
    by_z, by_v = expected_gradients(layer, z, g)
    gradient, _ = run(layer, z, g)
    torch.testing.assert_close(gradient, by_z)
    torch.testing.assert_close(layer.head.prototypes.grad, by_v)
    assert layer.head.gain.grad != 0


def test_frozen_encoder_still_teaches_prototypes() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    z, _ = layer(torch.randn(BATCH, DIM))
    nn.Linear(DIM, 3)(z).square().sum().backward()
    assert layer.head.prototypes.grad.any()


def test_paper_preset() -> None:
    layer = PrototypicalRegularizer.paper(DIM, K, mmd_weight=0.5)
    assert layer.head.similarity == "dot"
    assert (layer.mmd.options.target, layer.mmd.options.statistic, layer.mmd.options.reduction) == (
        "sampled",
        "biased",
        "sum",
    )
    assert layer.mmd.options.scales == (2.0,)
    assert (layer.mode, layer.prototype_weight, layer.mmd_weight, layer.follower.rate) == ("weighted", 1.0, 0.5, 0.0)
    z = torch.randn(BATCH, DIM, requires_grad=True)
    layer(z)[1].loss.backward()
    assert z.grad.any()


def test_components_can_be_replaced() -> None:
    head = proto_reg.PrototypeHead(DIM, K, similarity="euclidean")
    assigner, mmd = SinkhornAssigner(0.02), proto_reg.AnchoredMMDLoss("energy")
    layer = PrototypicalRegularizer(DIM, K, head=head, assigner=assigner, mmd=mmd)
    assert (layer.head, layer.assigner, layer.mmd) == (head, assigner, mmd)
    with pytest.raises(ValueError, match="head: expected latent_dim=8"):
        PrototypicalRegularizer(8, K, head=head)
    for name, wrong in (("head", nn.Linear(DIM, K)), ("assigner", nn.Identity()), ("mmd", nn.Identity())):
        with pytest.raises(TypeError, match=f"{name}: expected a"):
            PrototypicalRegularizer(DIM, K, **{name: wrong})
    with pytest.raises(ValueError, match=r"marginals: expected shape \(5,\)"):
        PrototypicalRegularizer(DIM, K, assigner=SinkhornAssigner(marginals=[0.5, 0.5]))
    assert "mode='balanced'" in repr(layer)


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_a_single_prototype_pulls_at_no_latent(rate: float) -> None:
    """Its codes are 1, except for rounding. The layer must not scale this rounding to the size of the gradient."""
    layer = PrototypicalRegularizer(DIM, 1, mmd_weight=0.0, follow_rate=rate)
    z, gradient = torch.randn(64, DIM, requires_grad=True), torch.randn(64, DIM)
    layer(z)[0].backward(gradient)
    assert torch.equal(z.grad, gradient)
    assert not layer.head.prototypes.grad.any()


def test_a_latent_that_is_not_finite_is_nobodys() -> None:
    """All codes of its batch are NaN. No prototype may move to latents that do not belong to it."""
    layer = PrototypicalRegularizer(DIM, K)
    z = torch.randn(BATCH, DIM)
    z[3, 2] = torch.inf
    layer(z.requires_grad_())
    assert not layer.follower.weight_sums.any()


def test_moved_prototypes_tell_graphs_that_hold_them() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    z = torch.randn(BATCH, DIM, requires_grad=True)
    layer(z)[0].sum().backward()
    optimizer.step()
    held = layer.head.prototypes.pow(3).sum()
    layer(z)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


def test_a_second_derivative_is_refused() -> None:
    layer = PrototypicalRegularizer(DIM, K)
    z = torch.randn(BATCH, DIM, requires_grad=True)
    (gradient,) = torch.autograd.grad((layer(z)[0] ** 3).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="got a second"):
        gradient.square().sum().backward()
