"""Maximum mean discrepancy between the latents of each prototype and the normal distribution around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from .._checks import (
    check_choice,
    check_floating,
    check_mask,
    check_matrix,
    check_number,
    check_positive_int,
    compute_dtype,
)
from .._distributed import Group, resolve, size, with_gradients
from ..kernels import backends
from ..kernels.closed_forms import KERNELS
from ..kernels.first_order import transforming, with_slopes
from ..kernels.mmd import (
    Form,
    anchored_mmd_loss_reference,
    anchored_mmd_loss_without_graph,
    anchored_mmd_reference,
    weighted_mmd_reference,
)
from ..kernels.mmd_distributed import gathered_mmd, gathered_weighted_mmd
from .features import feature_mmd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
TARGETS = ("analytic", "sampled")
STATISTICS = ("unbiased", "biased")
REDUCTIONS = ("mean", "sum")
BACKENDS = ("auto", "torch", "cpu")


class MMDOptions(NamedTuple):
    """What :func:`anchored_mmd` can be told beside its tensors; see there."""

    kernel: str = "gaussian"
    scales: Sequence[float] = DEFAULT_SCALES
    target: str = "analytic"
    statistic: str = "unbiased"
    reduction: str = "mean"
    features: int | None = None
    seed: int = 0
    backend: str = "auto"

    def checked(self) -> Self:
        """The same, with scales as floats. TypeError or ValueError for an option that is not a documented one."""
        check_choice("kernel", self.kernel, KERNELS)
        check_choice("target", self.target, TARGETS)
        check_choice("statistic", self.statistic, STATISTICS)
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("backend", self.backend, BACKENDS)
        check_positive_int("seed", self.seed, minimum=0)
        if isinstance(self.scales, str) or not isinstance(self.scales, Sequence):
            came = type(self.scales).__name__
            raise TypeError(f"scales: expected a sequence of numbers, got {came}. Pass (1.0,) for one.")
        if len(self.scales) == 0:
            raise ValueError("scales: expected at least one bandwidth, got none. Leave the default, or pass (1.0,).")
        scales = tuple(check_number("scales", scale, above=0) for scale in self.scales)
        if self.features is not None:
            check_positive_int("features", self.features, minimum=len(scales))
            if self.kernel != "gaussian" or self.target != "analytic":
                raise ValueError(
                    f"features: expected None with kernel={self.kernel!r} and target={self.target!r}, got "
                    f"{self.features}. Frequencies are drawn for the Gaussian kernel and the analytic target."
                )
        return self._replace(scales=scales)

    def form(self) -> Form:
        """As the operators take it."""
        return self.kernel, list(self.scales), self.statistic == "unbiased", self.reduction == "mean"


def anchored_mmd(
    z: Tensor,
    anchors: Tensor,
    assignments: Tensor,
    *,
    std: float = 1.0,
    kernel: str = "gaussian",
    scales: Sequence[float] = DEFAULT_SCALES,
    target: str = "analytic",
    statistic: str = "unbiased",
    reduction: str = "mean",
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    features: int | None = None,
    seed: int = 0,
    backend: str = "auto",
    group: Group = None,
) -> Tensor:
    """sum_k c_k MMD^2(latents of prototype k, N(v_k, std^2 I)) (paper, eq. 4 and 5, where std = 1).

    It is computed on residuals r = (z - v) / std in float32, or in float64 for float64 latents, also inside autocast.
    Memory grows with the largest slab of a cluster's kernel matrix, not with B^2. Gradients are first order.

    Args:
        z: (B, D) latents.
        anchors: (K, D) prototypes.
        assignments: (B,) int64 in [0, K); other values leave the latent out. Or (B, K) weights >= 0. They carry no
            gradient, and cost a B x B product.
        std: standard deviation of the normal distribution around each prototype, > 0.
        kernel: ``"gaussian"`` exp(-d^2 / (2 D s)), ``"imq"`` 2 D s / (2 D s + d^2), both averaged over the scales s,
            or ``"energy"`` -d.
        scales: bandwidths s, > 0, in units of the dimension D.
        target: ``"analytic"`` takes the expectations under the normal distribution in closed form. ``"sampled"`` draws
            one sample for each latent, at about 4 times the variance; it needs hard assignments.
        statistic: ``"unbiased"`` (U) or ``"biased"`` (V). The biased one is >= 0 and shrinks clusters.
        reduction: with ``"mean"`` c_k is the share of latents assigned to k; with ``"sum"`` it is 1, as in the paper.
        mask: (B,) bool, True = the latent counts.
        generator: of the sampled target. In a group the first rank draws.
        features: number of random frequencies that estimate the Gaussian kernel's statistic in time linear in B. It
            needs hard assignments and the analytic target. The estimate is unbiased over the draw, which depends on
            ``seed`` alone. None computes the statistic exactly.
        seed: of the frequencies.
        backend: ``"auto"``, ``"torch"`` or ``"cpu"``. The compiled kernel computes hard assignments with the Gaussian
            kernel and the analytic target in float32; ``"auto"`` takes it if it can.
        group: a ProcessGroup, or ``"default"``: the latents of all its ranks are one batch. They are gathered; with
            ``features`` K (2 features + 1) numbers are summed instead. B may differ and be 0; all ranks must call. The
            loss is that of the whole batch, equal on every rank. Gradients are those of this rank's latents; their
            average over the ranks is the gradient of the whole.

    Returns:
        A scalar. A prototype with fewer than two latents adds exactly 0, also to the gradient.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size or value, named; a backend that cannot compute this.
        RuntimeError: a backend that is not built here. Both say why, and what to do.
    """
    options = MMDOptions(kernel, scales, target, statistic, reduction, features, seed, backend).checked()
    return evaluate_mmd(z, anchors, assignments, options, std, mask, generator, group)[0]


def evaluate_mmd(
    z: Tensor,
    anchors: Tensor,
    assignments: Tensor,
    options: MMDOptions,
    std: float = 1.0,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """:func:`anchored_mmd` under checked ``options``, and its gradient by ``z`` (B, D), a constant."""
    ranks = resolve(group)
    z, anchors, assignments = check_mmd_inputs(z, anchors, assignments, mask, empty=ranks is not None)
    check_number("std", std, above=0)
    compiled = _compiled(z, anchors, assignments, options)
    if std != 1:
        z, anchors = z / std, anchors / std
    if assignments.is_floating_point():
        _check_soft(options)
        weights = assignments.detach()
        if mask is not None:  # before any product: 0 times a NaN would be one
            z, weights = (torch.where(mask[:, None], x, 0.0) for x in (z, weights))
        loss, gradient = _weighted(z, anchors, weights, options.form(), ranks)
    elif options.features is None and ranks is None:
        loss, gradient = _alone(z, anchors, assignments, mask, options, generator, compiled)
    else:
        members = assignments if mask is None else torch.where(mask, assignments, -1)
        loss, gradient = _together(z, anchors, members, options, generator, compiled, ranks)
    return loss, gradient if std == 1 else gradient / std


def _together(
    z: Tensor,
    anchors: Tensor,
    assignments: Tensor,
    options: MMDOptions,
    generator: torch.Generator | None,
    compiled: bool,
    ranks: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The MMD of the latents of all ranks by assignments (B,). Latents are gathered, or their ``features`` summed."""
    inside = (assignments >= 0) & (assignments < len(anchors))
    index = torch.where(inside, assignments, 0)
    residuals, members = z - anchors[index], torch.where(inside, index, -1)
    rows = residuals.detach(), members, len(anchors)
    if options.features is None:
        sampled = options.target == "sampled"
        loss, gradient = gathered_mmd(*rows, options.form(), sampled, generator, compiled, ranks)
    else:
        _, scales, unbiased, by_mass = options.form()
        values, gradient, counts = feature_mmd(*rows, scales, unbiased, options.features, options.seed, ranks)
        weights = counts / counts.sum().clamp_min(1) if by_mass else torch.ones_like(values)
        loss, gradient = (values * weights).sum(), gradient * weights[index, None]
    gradient = gradient * size(ranks)
    return with_gradients(loss, [residuals], [gradient]), gradient


def _weighted(
    z: Tensor, anchors: Tensor, weights: Tensor, form: Form, ranks: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The MMD by weights (B, K) of each latent in each cluster."""
    if ranks is not None:
        loss, gradient, by_anchors = gathered_weighted_mmd(z.detach(), anchors.detach(), weights, form, ranks)
        gradient = gradient * size(ranks)
        return with_gradients(loss, [z, anchors], [gradient, by_anchors]), gradient
    if transforming():
        loss, gradient, _ = weighted_mmd_reference(z.detach(), anchors.detach(), weights, *form)
        return with_slopes("anchored_mmd", loss, [z], [gradient]), gradient
    loss, gradient, _ = torch.ops.proto_reg.weighted_mmd(z, anchors, weights, *form)
    return loss, gradient


def _alone(
    z: Tensor,
    anchors: Tensor,
    assignments: Tensor,
    mask: Tensor | None,
    options: MMDOptions,
    generator: torch.Generator | None,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """The MMD of this process's latents by assignments (B,)."""
    kernel, scales, unbiased, by_mass = options.form()
    arguments = (assignments, mask, scales, unbiased, by_mass)
    samples = None
    if options.target == "sampled":
        # torch.randn takes no generator in a graph with an open number of latents.
        samples = torch.empty(z.shape, dtype=z.dtype, device=z.device).normal_(generator=generator)
    if transforming():
        with torch.no_grad():
            loss, gradient = anchored_mmd_loss_reference(
                z.detach(), anchors.detach(), *arguments, kernel, samples, anchored_mmd_reference
            )
        return with_slopes("anchored_mmd", loss, [z], [gradient]), gradient
    if not compiled:
        return anchored_mmd_loss_reference(z, anchors, *arguments, kernel, samples)
    if torch.is_grad_enabled() and (z.requires_grad or anchors.requires_grad):
        return torch.ops.proto_reg.anchored_mmd_loss(z, anchors, *arguments)
    return anchored_mmd_loss_without_graph(z, anchors, *arguments)


def _compiled(z: Tensor, anchors: Tensor, assignments: Tensor, options: MMDOptions) -> bool:
    """Whether the compiled kernel computes this call; ValueError if ``options.backend`` insists and it cannot."""
    backend = options.backend
    if backend == "torch":
        return False
    exact = options.kernel == "gaussian" and options.target == "analytic" and options.features is None
    single = z.dtype == anchors.dtype == torch.float32
    if z.is_cpu and single and exact and not assignments.is_floating_point():
        return backends.choose(backend, z) == "cpu"
    if backend == "auto":
        return False
    raise ValueError(
        f"backend: expected one that can compute this MMD, got {backend!r}, which takes float32 latents on the CPU, "
        "kernel='gaussian', target='analytic' and (B,) assignments. Use 'auto' for what can run."
    )


def _check_soft(options: MMDOptions) -> None:
    """ValueError for what (B, K) weights cannot be combined with."""
    features = options.features
    if options.target == "sampled" or features is not None:
        name, analytic, came = ("features", "None", features) if features else ("target", "'analytic'", "'sampled'")
        raise ValueError(
            f"{name}: expected {analytic} with (B, K) weights, got {came}. Leave the default, or use hard "
            "assignments such as weights.argmax(1)."
        )


def check_mmd_inputs(
    z: Tensor, anchors: Tensor, assignments: Tensor, mask: Tensor | None, *, empty: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors after checks, the first two in the dtype of the computation. ``empty``: B may be 0."""
    check_matrix("z", z, axes="(B, D)", empty=empty)
    check_matrix("anchors", anchors, z.shape[1], axes="(K, D)")
    check_mask("mask", mask, (z.shape[0],))
    if not isinstance(assignments, Tensor):
        raise TypeError(f"assignments: expected a torch.Tensor, got {type(assignments).__name__}. Wrap it.")
    dtype = compute_dtype(torch.promote_types(z.dtype, anchors.dtype))
    hard = not assignments.is_floating_point()
    if hard and assignments.dtype != torch.int64:
        raise TypeError(
            f"assignments: expected int64 indices or floating-point weights, got {assignments.dtype}. "
            "Convert indices with assignments.long()."
        )
    expected = (z.shape[0],) if hard else (z.shape[0], anchors.shape[0])
    if tuple(assignments.shape) != expected:
        raise ValueError(
            f"assignments: expected shape {expected} for {'indices' if hard else 'weights'}, got "
            f"{tuple(assignments.shape)}. Pass one {'index' if hard else 'row of K weights'} for each latent"
            f"{'' if hard else ', or convert indices with assignments.long()'}."
        )
    if not hard:
        check_floating("assignments", assignments)
    if not hard and assignments.numel() and assignments.device.type == "cpu" and not torch.compiler.is_compiling():
        lowest = assignments.detach().amin().item()
        if lowest < 0:  # NaN passes: some trainings skip such steps
            raise ValueError(
                f"assignments: expected weights >= 0, got a minimum of {lowest:.3g}. Pass codes, not scores."
            )
    return z.to(dtype), anchors.to(dtype), assignments if hard else assignments.to(dtype)
