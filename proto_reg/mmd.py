"""The anchored MMD as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ._checks import check_choice
from ._distributed import Group, Ranks
from .functional.mmd import BACKENDS, DEFAULT_SCALES, anchored_mmd, anchored_mmd_and_gradient, check_mmd_options


class AnchoredMMDLoss(nn.Module):
    """Squared MMD between the latents of each prototype and the normal distribution N(v_k, std^2 I) around it.

    See :func:`proto_reg.functional.anchored_mmd` for the formula and every option.

    Args:
        kernel: ``"gaussian"``, ``"imq"`` or ``"energy"``.
        scales: bandwidths in units of D.
        target: ``"analytic"`` or ``"sampled"``.
        statistic: ``"unbiased"`` or ``"biased"``.
        reduction: ``"mean"`` weighs clusters by their size, ``"sum"`` adds them up.
        features: number of random frequencies that estimate the statistic in linear time; None computes it exactly.
        seed: of the frequencies.
        backend: ``"auto"``, ``"torch"`` or ``"cpu"``.
        group: the processes whose latents are one batch in training mode: ``"default"`` (the default process group, if
            there is one), None (this process alone) or a ProcessGroup. In eval mode each process works alone.

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
        features: int | None = None,
        seed: int = 0,
        backend: str = "auto",
        group: Group = "default",
    ) -> None:
        super().__init__()
        check_mmd_options(kernel, scales, target, statistic, reduction, features, seed)
        self.kernel = kernel
        self.scales = tuple(float(s) for s in scales)
        self.target = target
        self.statistic = statistic
        self.reduction = reduction
        self.features = features
        self.seed = seed
        self.backend = check_choice("backend", backend, BACKENDS)
        self.ranks = Ranks(group)

    def forward(
        self, z: Tensor, anchors: Tensor, assignments: Tensor, mask: Tensor | None = None, std: float = 1.0
    ) -> Tensor:
        """Scalar loss of latents ``z`` (B, D) around ``anchors`` (K, D), the normal distributions of deviation ``std``.

        ``assignments`` are (B,) int64 or (B, K) weights, ``mask`` (B,) bool leaves latents out.
        """
        group = self.ranks.active(self.training)
        return anchored_mmd(z, anchors, assignments, mask=mask, std=std, group=group, **self._options())

    def value_and_gradient(
        self, z: Tensor, anchors: Tensor, assignments: Tensor, mask: Tensor | None = None, std: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The loss () and its gradient by ``z`` (B, D), both without autograd history."""
        group = self.ranks.active(self.training)
        return anchored_mmd_and_gradient(z, anchors, assignments, mask=mask, std=std, group=group, **self._options())

    def _options(self) -> dict:
        names = ("kernel", "scales", "target", "statistic", "reduction", "features", "seed", "backend")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items() if value is not None)
