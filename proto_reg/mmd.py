"""The anchored MMD as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._checks import check_positive_int
from ._distributed import Group, Ranks
from .functional.mmd import DEFAULT_SCALES, MMDOptions, evaluate_mmd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        max_tokens: the layer hands over at most this many latents of a training step, a new subsample each step.
            A program of ``torch.export`` hands over all. A call of this module takes all that it gets.
        seed: of the frequencies and of the subsamples.
        backend: ``"auto"``, ``"torch"`` or ``"cpu"``.
        group: the processes whose latents are one batch in training mode: ``"default"`` (the default process group, if
            there is one), None (this process alone) or a ProcessGroup. In eval mode each process works alone.

    Attributes:
        options: the options above that the function takes, as one tuple.

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
        max_tokens: int = 4096,
        seed: int = 0,
        backend: str = "auto",
        group: Group = "default",
    ) -> None:
        super().__init__()
        self.options = MMDOptions(kernel, scales, target, statistic, reduction, features, seed, backend).checked()
        self.max_tokens = check_positive_int("max_tokens", max_tokens, minimum=2)
        self.ranks = Ranks(group)

    if TYPE_CHECKING:

        def __call__(
            self, z: Tensor, anchors: Tensor, assignments: Tensor, mask: Tensor | None = None, std: float = 1.0
        ) -> Tensor: ...

    def forward(
        self, z: Tensor, anchors: Tensor, assignments: Tensor, mask: Tensor | None = None, std: float = 1.0
    ) -> Tensor:
        """Loss () of latents ``z`` (B, D) around ``anchors`` (K, D), the normal distributions of deviation ``std``.

        ``assignments`` are (B,) int64 or (B, K) weights. ``mask`` (B,) bool is True for the latents that count.
        """
        return evaluate_mmd(z, anchors, assignments, self.options, std, mask, None, self._group())[0]

    def value_and_gradient(
        self, z: Tensor, anchors: Tensor, assignments: Tensor, mask: Tensor | None = None, std: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The loss () and its gradient by ``z`` (B, D), both without a graph."""
        with torch.no_grad():
            return evaluate_mmd(z, anchors, assignments, self.options, std, mask, None, self._group())

    def _group(self) -> ProcessGroup | None:
        return self.ranks.active(self.training)

    def extra_repr(self) -> str:
        options = (f"{name}={value!r}" for name, value in self.options._asdict().items() if value is not None)
        return ", ".join([*options, f"max_tokens={self.max_tokens}"])
