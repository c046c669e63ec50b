"""Gradients through the iterations, in memory that does not grow with them: against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import cosines
from torch import Tensor

from proto_reg import SinkhornAssigner
from proto_reg.functional import sinkhorn, sinkhorn_with_dustbin
from proto_reg.kernels.sinkhorn_log import balance_logits

TINY, STRIP, SMALL, LONG = (37, 4, 4), (19, 5, 7), (3, 20, 17), (2, 40, 130)
SHAPES = [TINY, STRIP, SMALL, LONG, (9, 1), (1, 9), (50, 1, 3), (700, 5), (600, 70), (33, 65), (4, 300, 513)]


def drawn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).tanh()


def autograd(scores: Tensor, options: dict, epsilon: float, num_iters: int, by: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients by scores, marginals and weights (those there are), unrolled in float64."""
    leaves = [scores.double().requires_grad_()]
    marginals, weights = (None if options.get(name) is None else options[name].double() for name in OPTIONS)
    leaves += [leaf.requires_grad_() for leaf in (marginals, weights) if leaf is not None]
    shares = None if marginals is None else marginals / marginals.sum(-1, keepdim=True)
    scaled = None if weights is None else weights / weights.amax(-1, keepdim=True)
    codes, potentials = balance_logits(leaves[0], shares, scaled, epsilon, num_iters, options.get("tol"))
    found = torch.where(potentials > -torch.inf, potentials, 0.0)
    gradients = torch.autograd.grad((codes * by[0]).sum() + (found * by[1]).sum(), leaves)
    # A share or weight of 0 is left out.
    return [gradients[0], *(torch.where(leaf > 0, x, 0.0) for leaf, x in zip(leaves[1:], gradients[1:], strict=True))]


OPTIONS = ("marginals", "weights")


def ours(
    scores: Tensor, options: dict, epsilon: float, num_iters: int, by: tuple[Tensor, Tensor], **more
) -> list[Tensor]:
    leaves = [scores.clone().requires_grad_()]
    given = {name: options[name].clone().requires_grad_() for name in OPTIONS if name in options}
    more = {"differentiable": True, "return_potentials": True} | options | given | more
    codes, potentials = sinkhorn(leaves[0], epsilon, num_iters, **more)
    loss = (codes * by[0].to(codes)).sum()
    if potentials.requires_grad:
        loss = loss + (torch.where(potentials > -torch.inf, potentials, 0.0) * by[1].to(potentials)).sum()
    return list(torch.autograd.grad(loss, [*leaves, *given.values()]))


def close(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    """Errors relative to the largest entry. That is 1 at least: so large are the gradients by codes and potentials."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).abs().max().item() <= bound * max(1.0, other.abs().max().item())


def problem(shape: tuple[int, ...]) -> tuple[Tensor, dict, tuple[Tensor, Tensor]]:
    scores, by_codes, by_potentials = drawn(shape), torch.randn(shape), torch.randn(*shape[:-2], shape[-1])
    shares = torch.rand(*shape[:-2], shape[-1]) + 0.1
    weights = torch.rand(shape[:-1])
    if shape[-1] > 2:
        shares[..., 1] = 0
    if shape[-2] > 4:
        weights[..., 2] = 0
    return scores, {"marginals": shares / shares.sum(-1, keepdim=True), "weights": weights}, (by_codes, by_potentials)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_against_float64(shape: tuple[int, ...], backend: str) -> None:
    scores, options, by = problem(shape)
    for epsilon, num_iters in ((0.3, 1), (0.3, 2), (0.1, 7)):
        for given in ({}, options):
            wanted = autograd(scores, given, epsilon, num_iters, by)
            close(ours(scores, given, epsilon, num_iters, by), wanted, 2e-5)
    if len(shape) == 3:  # shares that the groups have in common
        shared = {"marginals": options["marginals"][0]}
        close(ours(scores, shared, 0.3, 3, by), autograd(scores, shared, 0.3, 3, by), 1e-5)


@pytest.mark.parametrize("shape", [TINY, SMALL, LONG, (600, 70)], ids=str)
def test_many_iterations(shape: tuple[int, ...], backend: str) -> None:
    """More than the kernel collects before it brings the gradient up to date."""
    scores, options, by = problem(shape)
    found, wanted = ours(scores, options, 0.5, 150, by), autograd(scores, options, 0.5, 150, by)
    close(found[:1], wanted[:1], 2e-5)
    close(found[1:], wanted[1:], 1e-3)  # contributions of all iterations cancel


@pytest.mark.parametrize("shape", [TINY, SMALL, LONG, (600, 70)], ids=str)
@pytest.mark.parametrize("span", [200, 2000])
def test_wide_scores(shape: tuple[int, ...], span: float, backend: str) -> None:
    """The span costs no digits."""
    scores, options, by = problem(shape)
    for given in ({}, options):
        close(ours(span * scores, given, 1.0, 12, by), autograd(span * scores, given, 1.0, 12, by), 1e-5)


@pytest.mark.parametrize("shape", [TINY, SMALL, LONG, (600, 70)], ids=str)
def test_scores_of_minus_infinity_have_a_gradient_of_0(shape: tuple[int, ...], backend: str) -> None:
    scores, _, by = problem(shape)
    impossible = torch.rand(shape) > 0.7
    impossible[..., 0] = impossible[..., 0, :] = False
    impossible[..., 2] = True  # a column that gets nothing
    scores = scores.masked_fill(impossible, -torch.inf)
    found = ours(scores, {}, 0.3, 5, by)
    assert not found[0][impossible].any()
    low = torch.where(impossible, -200.0, scores)
    shares = torch.where(torch.arange(shape[-1]) == 2, 0.0, 1 / (shape[-1] - 1))
    wanted = autograd(low, {"marginals": shares}, 0.3, 5, (by[0], torch.zeros_like(by[1])))[:1]
    close(ours(scores, {}, 0.3, 5, (by[0], torch.zeros_like(by[1]))), wanted, 1e-5)


@pytest.mark.parametrize("shape", [TINY, SMALL, LONG], ids=str)
def test_tol_ends_each_group_on_its_own(shape: tuple[int, ...], backend: str) -> None:
    scores, options, by = problem(shape)
    scores = scores * torch.linspace(0.2, 1, shape[0])[:, None, None]
    options["tol"] = 1e-2
    close(ours(scores, options, 0.3, 100, by), autograd(scores, options, 0.3, 100, by), 2e-5)


@pytest.mark.parametrize("name", [True, "implicit"])
def test_what_is_kept_does_not_grow_with_the_iterations(name: bool | str, backend: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        leaf = drawn((64, 48)).to(dtype).requires_grad_()
        kept = kept_bytes(lambda leaf=leaf: sinkhorn(leaf, 0.1, 100, differentiable=name))
        assert kept <= (5 if dtype == torch.bfloat16 else 3) * leaf.numel() * dtype.itemsize


def kept_bytes(call: Callable[[], object]) -> int:
    """What autograd keeps of a call."""
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        call()
    return sum(kept.values())


def test_warm_starts_and_dustbins_keep_no_iteration_either(backend: str) -> None:
    leaf, g = drawn((64, 48)).requires_grad_(), torch.randn(48)
    options = {"differentiable": True, "potentials": g, "backend": backend}
    for call in (
        lambda: sinkhorn(leaf, 0.1, 100, **options),
        lambda: sinkhorn(leaf, 0.1, 100, return_info=True, **options),
        lambda: sinkhorn_with_dustbin(leaf, 0.0, 0.1, 100),
    ):
        assert kept_bytes(call) <= 8 * leaf.numel() * 4


@pytest.mark.parametrize("name", [True, "implicit"])
def test_gradients_after_a_warm_start(name: bool | str, backend: str) -> None:
    scores, options, by = problem(SMALL)
    by = by[0], torch.zeros_like(by[1])
    g = sinkhorn(scores + 0.1 * drawn(SMALL), 0.5, 5, return_potentials=True, **options)[1]
    found = ours(scores, options, 0.5, 200, by, differentiable=name, potentials=g, backend=backend)
    wanted = autograd(scores, options, 0.5, 200, by)
    close(found[:1], wanted[:1], 2e-5)
    close(found[1:], wanted[1:], 1e-3)
    assert not found[1][..., 1].any() and not found[2][..., 2].any()  # a share and a weight of 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_implicit_gradient_is_the_limit(dtype: torch.dtype, backend: str) -> None:
    for shape in ((5, 4, 4), (2, 30, 9), (9, 30), (70, 1)):
        scores, options, by = problem(shape)
        by = by[0], torch.zeros_like(by[1])
        for given in ({}, options):
            typed = {name: value.to(dtype) for name, value in given.items()}
            found = ours(scores.to(dtype), typed, 0.5, 400, by, differentiable="implicit")
            close(found, autograd(scores, given, 0.5, 400, by), 2e-5 if dtype == torch.float32 else 1e-9)


def test_second_derivatives() -> None:
    scores = cosines(5, 3, torch.float64).requires_grad_()
    weights = (torch.rand(5, dtype=torch.float64) + 0.1).requires_grad_()
    marginals = torch.rand(3, dtype=torch.float64).softmax(0).requires_grad_()

    def codes(s: Tensor, w: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return sinkhorn(s, 0.3, 4, weights=w, marginals=m, differentiable=True, return_potentials=True)

    assert torch.autograd.gradgradcheck(codes, (scores, weights, marginals))
    assert torch.autograd.gradgradcheck(lambda s: sinkhorn(s, 0.3, 4, differentiable=True), scores)
    implicit = sinkhorn(scores, 0.3, 4, differentiable="implicit")
    (gradient,) = torch.autograd.grad(implicit[0].square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="expected differentiable='implicit' to be differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", [True, "implicit"])
def test_transforms(name: bool | str, backend: str) -> None:
    scores, by = drawn((4, 9, 5)), torch.randn(4, 9, 5)

    def loss(s: Tensor, g: Tensor) -> Tensor:
        return (sinkhorn(s, 1.0, 60, differentiable=name) * g).sum()

    leaf = scores.clone().requires_grad_()
    loss(leaf, by).backward()
    each = torch.func.vmap(torch.func.grad(loss))(scores, by)
    torch.testing.assert_close(each, leaf.grad, rtol=1e-4, atol=1e-5)
    _, slope = torch.func.jvp(lambda s: loss(s, by), (scores,), (by,))
    torch.testing.assert_close(slope, (leaf.grad * by).sum(), rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(scores, by), by)
        assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None
    compiled = scores.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled, by).backward()
    torch.testing.assert_close(compiled.grad, leaf.grad, rtol=1e-4, atol=1e-5)


def test_half_precision(backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        scores, _, by = problem(LONG)
        scores = scores.to(dtype)
        found = ours(scores, {}, 0.3, 5, by)
        assert found[0].dtype == dtype
        close(found, autograd(scores, {}, 0.3, 5, by), 2e-2)


def test_nan_policies(backend: str) -> None:
    scores, _, by = problem((3, 20, 7))
    scores[1, 4, 2] = torch.nan
    codes = sinkhorn(leaf := scores.clone().requires_grad_(), 0.3, 5, differentiable=True)
    (codes * by[0]).sum().backward()
    assert leaf.grad[1].isnan().all()
    assert leaf.grad[[0, 2]].isfinite().all()
    leaf.grad = None
    codes = sinkhorn(leaf, 0.3, 5, differentiable=True, nan_policy="isolate")
    (torch.where(codes.isnan(), 0.0, codes) * by[0]).sum().backward()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[1, 4].any()


def test_opcheck(cpu_library: Path) -> None:
    for shape in (STRIP, (33, 7)):
        scores, options, by = problem(shape)
        sinkhorn(scores, differentiable=True)  # loads the library
        operator = torch.ops.proto_reg.sinkhorn_gradient.default
        torch.library.opcheck(operator, (scores, None, None, 0.3, 3, None, by[0], None))
        torch.library.opcheck(operator, (scores, options["marginals"], options["weights"], 0.3, 3, 1e-3, *by))


def test_the_assigner_is_a_differentiable_layer() -> None:
    scores = drawn((16, 5)).requires_grad_()
    assert not SinkhornAssigner(0.3)(scores).requires_grad
    for name in (True, "implicit"):
        assigner = SinkhornAssigner(0.3, 50, differentiable=name)
        assert f"differentiable={name!r}" in repr(assigner)
        (found,) = torch.autograd.grad(assigner(scores)[:, 0].square().sum(), scores)
        wanted = sinkhorn(scores, 0.3, 50, differentiable=name)[:, 0].square().sum()
        torch.testing.assert_close(found, torch.autograd.grad(wanted, scores)[0])
    with pytest.raises(ValueError, match="differentiable: expected"):
        SinkhornAssigner(differentiable="yes")
