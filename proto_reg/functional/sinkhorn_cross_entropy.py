"""The prototype loss against balanced codes, in one pass over the scores."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import kernels
from .._checks import check_floating, check_number
from .._distributed import Group, resolve, with_gradients
from .sinkhorn_arguments import SinkhornKeywords, SinkhornOptions, check_grouped, operator_arguments


def sinkhorn_cross_entropy(
    scores: Tensor,
    epsilon: float = 0.05,
    num_iters: int = 3,
    temperature: float = 0.1,
    *,
    group: Group = None,
    return_codes: bool = False,
    **options: Unpack[SinkhornKeywords],
) -> Tensor | tuple[Tensor, Tensor]:
    """``prototype_cross_entropy(scores, sinkhorn(scores), temperature)`` in one pass over the scores.

    The last Sinkhorn iteration gives loss and gradient together: -(1/W) sum_i w_i sum_k q_ik log p_ik with
    p = softmax(S / tau) (paper, eq. 10), and ``w_i (p - q) / (tau W)``. W is the sum of the weights. A prototype that
    ``prototype_mask`` leaves out is in neither softmax: the loss is that of the scores without its column.

    Args:
        scores: (B, K), differentiable. Nothing else is.
        temperature: tau, > 0.
        return_codes: also return the codes (B, K), which carry no gradient.
        group: the rows of all its ranks are one batch, see :func:`~proto_reg.functional.sinkhorn`. The loss is that of
            the whole batch, equal on every rank. Gradients are those of this rank's rows; their average over the ranks
            is the gradient of the whole.
        epsilon, num_iters, tol, marginals, prototype_mask, mask, weights, nan_policy, backend: see
            :func:`~proto_reg.functional.sinkhorn`.

    Returns:
        The loss, a scalar.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size or value, named.
        RuntimeError: a forced backend that is not built, with every reason.
    """
    given = SinkhornOptions(epsilon, num_iters, **options)
    if isinstance(given.weights, Tensor) and given.weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weights: expected a tensor without gradient, got requires_grad=True. Nothing flows back to weights here: "
            "pass weights.detach(), or weigh the rows' losses yourself."
        )
    if (ranks := resolve(group)) is not None:
        loss, gradient, codes = sinkhorn_cross_entropy_and_gradient(
            scores.detach(), epsilon, num_iters, temperature, group=ranks, **options
        )
        loss = with_gradients(loss, [scores], [gradient])
        return (loss, codes) if return_codes else loss
    plain, temperature = _cross_entropy_options(scores, temperature, given.backend)
    scores, arguments = operator_arguments(scores, given, entropy=True)
    if kernels.first_order.transforming():
        reference = kernels.sinkhorn_reference.sinkhorn_cross_entropy_reference
        loss, _, _, codes = reference(scores, *arguments, temperature, return_codes)
        return (loss, codes.detach()) if return_codes else loss
    loss, _, _, codes = kernels.sinkhorn.CrossEntropy.apply(plain, scores, *arguments, temperature, return_codes)
    return (loss, codes) if return_codes else loss


def sinkhorn_cross_entropy_and_gradient(
    scores: Tensor,
    epsilon: float = 0.05,
    num_iters: int = 3,
    temperature: float = 0.1,
    *,
    group: Group = None,
    **options: Unpack[SinkhornKeywords],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and codes of :func:`sinkhorn_cross_entropy` at once, for a backward pass of your own.

    No graph is built. Arguments and errors are the same.

    Returns:
        loss: ()
        gradient: (B, K) by ``scores``, in their dtype.
        codes: (B, K)
    """
    given, ranks = SinkhornOptions(epsilon, num_iters, **options), resolve(group)
    check_grouped(ranks, given.backend)
    plain, temperature = _cross_entropy_options(scores, temperature, given.backend)
    scores, arguments = operator_arguments(scores, given, ranks, entropy=True)
    if ranks is not None:
        return kernels.sinkhorn_distributed.cross_entropy_over_group(ranks, scores, *arguments, temperature)
    loss, gradient, _, codes = kernels.sinkhorn.cross_entropy_without_graph(
        plain, scores, *arguments, temperature, True
    )
    return loss, gradient, codes


def _cross_entropy_options(scores: Tensor, temperature: float, backend: str) -> tuple[bool, float]:
    """Whether plain torch computes it, and the temperature, checked."""
    check_floating("scores", scores)
    if scores.ndim != 2:
        raise ValueError(f"scores: expected (B, K), got {tuple(scores.shape)}. Take the groups one by one.")
    temperature = check_number("temperature", temperature, above=0)
    return kernels.backends.choose(backend, scores) == "torch", temperature
