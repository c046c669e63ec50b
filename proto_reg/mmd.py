"""The anchored MMD as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ._checks import check_choice
from .functional.mmd import BACKENDS, DEFAULT_SCALES, anchored_mmd, anchored_mmd_and_gradient, check_mmd_options


class AnchoredMMDLoss(nn.Module):
    """Squared MMD between the latents of each prototype and the normal distribution N(v_k, I) around it.

    See :func:`proto_reg.functional.anchored_mmd` for the formula and every option.

    Args:
        kernel: ``"gaussian"``, ``"imq"`` or ``"energy"``.
        scales: bandwidths in units of D.
        target: ``"analytic"`` or ``"sampled"``.
        statistic: ``"unbiased"`` or ``"biased"``.
        reduction: ``"mean"`` weighs clusters by their size, ``"sum"`` adds them up.
        backend: ``"auto"``, ``"torch"`` or ``"cpu"``.

    Raises:
        TypeError, ValueError: an option that is not one of these, named.
    """

    def __init__(
        self,
        kernel: str = "gaussian",
        *,
        scales: Sequence[float] = DEFAULT_SCALES,
        target: str = "analytic",
        statistic: str = "unbiased",
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_mmd_options(kernel, scales, target, statistic, reduction)
        self.kernel = kernel
        self.scales = tuple(float(s) for s in scales)
        self.target = target
        self.statistic = statistic
        self.reduction = reduction
        self.backend = check_choice("backend", backend, BACKENDS)

    def forward(self, z: Tensor, anchors: Tensor, assignments: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar loss of latents ``z`` (B, D) around ``anchors`` (K, D).

        ``assignments`` are (B,) int64 or (B, K) weights, ``mask`` (B,) bool leaves latents out.
        """
        return anchored_mmd(z, anchors, assignments, mask=mask, **self._options())

    def value_and_gradient(
        self, z: Tensor, anchors: Tensor, assignments: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss () and its gradient by ``z`` (B, D), both without autograd history."""
        return anchored_mmd_and_gradient(z, anchors, assignments, mask=mask, **self._options())

    def _options(self) -> dict:
        names = ("kernel", "scales", "target", "statistic", "reduction", "backend")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())
