"""``proto_reg::sinkhorn`` and its relatives: schemas, fakes, autograd, registration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import compute_dtype
from .first_order import Once, without_graph
from .sinkhorn_reference import sinkhorn_cross_entropy_reference, sinkhorn_reference


def sinkhorn_codes_reference(
    scores: Tensor,
    epsilon: float,
    num_iters: int,
    marginals: Tensor | None = None,
    weights: Tensor | None = None,
    tol: float | None = None,
    isolate: bool = False,
) -> Tensor:
    """:func:`sinkhorn_reference` without potentials, frequent arguments first: each output and argument takes time."""
    return sinkhorn_reference(scores, marginals, weights, epsilon, num_iters, tol, isolate, False)[0]


def sinkhorn_out_reference(scores: Tensor, *options_and_codes) -> Tensor:
    """:func:`sinkhorn_reference`, which writes the codes into its last argument and returns the potentials."""
    *options, codes = options_and_codes
    computed, potentials = sinkhorn_reference(scores, *options)
    codes.copy_(computed)
    return potentials


_OPTIONS = "Tensor? marginals, Tensor? weights, float epsilon, int num_iters, float? tol, bool isolate"
_DEFINITIONS: dict[str, tuple[str, Callable[..., object]]] = {
    "sinkhorn": (f"(Tensor scores, {_OPTIONS}) -> (Tensor codes, Tensor potentials)", sinkhorn_reference),
    "sinkhorn_codes": (
        "(Tensor scores, float epsilon, int num_iters, Tensor? marginals=None, Tensor? weights=None, float? tol=None, "
        "bool isolate=False) -> Tensor",
        sinkhorn_codes_reference,
    ),
    "sinkhorn_out": (f"(Tensor scores, {_OPTIONS}, Tensor(a!) codes) -> Tensor potentials", sinkhorn_out_reference),
    "sinkhorn_cross_entropy": (
        f"(Tensor scores, {_OPTIONS}, float temperature, bool with_codes)"
        " -> (Tensor loss, Tensor gradient, Tensor potentials, Tensor codes)",
        sinkhorn_cross_entropy_reference,
    ),
}
for _name, (_schema, _reference) in _DEFINITIONS.items():
    torch.library.define(f"proto_reg::{_name}", _schema)
    torch.library.impl(f"proto_reg::{_name}", "CompositeExplicitAutograd")(torch.no_grad()(_reference))


@torch.library.register_fake("proto_reg::sinkhorn")
def _fake(scores: Tensor, *options) -> tuple[Tensor, Tensor]:
    return _fake_codes(scores), _fake_potentials(scores)


@torch.library.register_fake("proto_reg::sinkhorn_codes")
def _fake_codes(scores: Tensor, *options) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.register_fake("proto_reg::sinkhorn_out")
def _fake_potentials(scores: Tensor, *options) -> Tensor:
    shape = (*scores.shape[:-2], scores.shape[-1])
    return scores.new_empty(shape, dtype=compute_dtype(scores.dtype))


@torch.library.register_fake("proto_reg::sinkhorn_cross_entropy")
def _fake_cross_entropy(scores: Tensor, *options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient, potentials = _fake(scores)
    codes = torch.empty_like(gradient) if options[-1] else scores.new_empty((0, scores.shape[1]))
    return potentials.new_empty(()), gradient, potentials, codes


# Codes are targets, not predictions (SwAV). A fall-through at autograd's key says so and takes no time.
for _name in ("sinkhorn", "sinkhorn_codes", "sinkhorn_out"):
    torch.library.impl(f"proto_reg::{_name}", "Autograd")(torch.library.fallthrough_kernel)


def _save_gradient(ctx, inputs, output) -> None:
    _, gradient, potentials, codes = output
    ctx.save_for_backward(gradient)
    ctx.mark_non_differentiable(gradient, potentials, codes)
    ctx.set_materialize_grads(False)


def _scaled_gradient(ctx, by_loss: Tensor | None, *others) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return None if by_loss is None else gradient * by_loss, *([None] * 8)


torch.library.register_autograd("proto_reg::sinkhorn_cross_entropy", _scaled_gradient, setup_context=_save_gradient)


def cross_entropy_without_graph(plain: bool, scores: Tensor, *options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fused operator, or its plain-torch reference if ``plain``; without a graph."""
    if plain:
        with torch.no_grad():
            return sinkhorn_cross_entropy_reference(scores, *options)
    return without_graph(torch.ops.proto_reg.sinkhorn_cross_entropy.default, scores, *options)


class CrossEntropy(torch.autograd.Function):
    """:func:`cross_entropy_without_graph` with a graph, at a third of the time of the operator's own autograd."""

    @staticmethod
    def forward(ctx, plain: bool, scores: Tensor, *options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, gradient, potentials, codes = cross_entropy_without_graph(plain, scores, *options)
        ctx.save_for_backward(gradient, scores)
        ctx.mark_non_differentiable(gradient, potentials, codes)
        ctx.set_materialize_grads(False)
        return loss, gradient, potentials, codes

    @staticmethod
    def backward(ctx, by_loss: Tensor | None, *others) -> tuple[Tensor | None, ...]:
        gradient, scores = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            message = (
                "sinkhorn_cross_entropy: expected to be differentiated once, got a second derivative. Use "
                "prototype_cross_entropy(scores, sinkhorn(scores)) for that."
            )
            gradient = Once.apply(gradient, scores, message)
        return None, None if by_loss is None else gradient * by_loss, *([None] * 8)
