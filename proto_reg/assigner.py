"""Balanced assignment of latents to prototypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from ._checks import check_choice, check_number, check_positive_int
from ._distributed import Group, Ranks, sum_
from ._state import WideState
from .functional.prototypes import prototype_cross_entropy_and_gradient
from .functional.sinkhorn import BACKENDS, sinkhorn
from .functional.sinkhorn_arguments import NAN_POLICIES, as_marginals, check_differentiable, check_marginals
from .functional.sinkhorn_cross_entropy import sinkhorn_cross_entropy_and_gradient
from .kernels.snapshot import snapshot

ADAPTIVE = "adaptive"
RATE = 0.01  # of adaptive marginals: a memory of a hundred steps


class SinkhornAssigner(WideState):
    """Assigns latents to prototypes so that each prototype gets its share; see :func:`proto_reg.functional.sinkhorn`.

    Args:
        epsilon: entropic regularisation, > 0, in units of the scores.
        num_iters: Sinkhorn iterations, >= 1.
        tol: stop once every column is within this relative error of its marginal, at least 2e-6 in float32.
        marginals: (K,) share of the batch for each prototype, summing to 1; uniform by default. ``"adaptive"``:
            training estimates them. Use it where some kinds of data are rarer than others. See :meth:`observe`.
        num_prototypes: K, with ``marginals="adaptive"`` only. Other marginals tell it themselves.
        smoothing: in (0, 1]. Adaptive marginals are ``(1 - smoothing)`` times the estimate plus ``smoothing / K``. So
            no share falls below ``smoothing / K``, and no prototype dies of a low share. With 1 all shares are equal.
        nan_policy: ``"propagate"``, ``"isolate"`` or ``"raise"``.
        differentiable: whether gradients flow through the codes of a call: False, True or ``"implicit"``, see
            :func:`~proto_reg.functional.sinkhorn`. The prototype loss takes codes as constants all the same.
        backend: ``"auto"``, ``"torch"``, ``"cpu"``, ``"cuda"`` or ``"triton"``.
        group: the processes whose rows are balanced as one batch in training mode: ``"default"`` (the default process
            group, if there is one), None (this process alone) or a ProcessGroup. In eval mode each process works alone.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """

    marginals: Tensor | None

    def __init__(
        self,
        epsilon: float = 0.05,
        num_iters: int = 3,
        *,
        tol: float | None = None,
        marginals: Tensor | Sequence[float] | str | None = None,
        num_prototypes: int | None = None,
        smoothing: float = 0.1,
        nan_policy: str = "propagate",
        differentiable: bool | Literal["implicit"] = False,
        backend: str = "auto",
        group: Group = "default",
    ) -> None:
        super().__init__()
        self.epsilon = check_number("epsilon", epsilon, above=0)
        self.num_iters = check_positive_int("num_iters", num_iters)
        self.tol = None if tol is None else check_number("tol", tol, above=0)
        self.nan_policy = check_choice("nan_policy", nan_policy, NAN_POLICIES)
        self.differentiable = check_differentiable(differentiable)
        self.backend = check_choice("backend", backend, BACKENDS)
        self.ranks = Ranks(group)
        self.adaptive = isinstance(marginals, str)
        if num_prototypes is not None:
            check_positive_int("num_prototypes", num_prototypes)
        self.smoothing = check_number("smoothing", smoothing, above=0)
        if self.smoothing > 1:
            raise ValueError(f"smoothing: expected a number in (0, 1], got {smoothing}. With 1 all shares are equal.")
        if (num_prototypes is not None) != self.adaptive:
            raise ValueError(
                "num_prototypes: expected a number with marginals='adaptive' and None otherwise, got "
                f"{num_prototypes}. Other marginals tell their number themselves."
            )
        if isinstance(marginals, str):
            check_choice("marginals", marginals, (ADAPTIVE,))
            self.register_buffer("marginals", torch.ones(cast(int, num_prototypes), dtype=torch.float32))
            self.reset_parameters()
            return
        if marginals is not None:
            marginals = as_marginals(marginals).to(torch.float32)
            check_marginals(marginals, None)
        self.register_buffer("marginals", marginals)

    def _shares(self) -> Tensor | None:
        marginals = self._buffers["marginals"]  # as an attribute it takes as long as all checks of arguments
        return snapshot(marginals) if marginals is not None and self.adaptive else marginals

    def forward(
        self,
        scores: Tensor,
        mask: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        prototype_mask: Tensor | None = None,
    ) -> Tensor:
        """Codes like ``scores`` (..., B, K): rows sum to 1.

        Args:
            mask: (..., B) bool, True where a row counts.
            weights: (..., B) >= 0: a row of weight 2 counts as two rows.
            prototype_mask: (K,) or (..., K) bool, True where a prototype takes part.
        """
        # A dict of options would take a microsecond, a fifth of a small problem.
        return sinkhorn(
            scores,
            self.epsilon,
            self.num_iters,
            tol=self.tol,
            marginals=self._shares(),
            prototype_mask=prototype_mask,
            mask=mask,
            weights=weights,
            nan_policy=self.nan_policy,
            differentiable=self.differentiable,
            backend=self.backend,
            group=self.ranks.active(self.training),
        )

    if TYPE_CHECKING:  # torch's own returns Any

        def __call__(
            self,
            scores: Tensor,
            mask: Tensor | None = None,
            *,
            weights: Tensor | None = None,
            prototype_mask: Tensor | None = None,
        ) -> Tensor: ...

    def cross_entropy_and_gradient(
        self, scores: Tensor, temperature: float, mask: Tensor | None = None, *, rows: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of softmax(S / tau) against the codes, its gradient by ``scores[:rows]``, and the codes.

        No graph is built. One fused operator computes all three. A subclass with a ``forward`` of its own gives the
        codes by that.

        Args:
            scores: (B, K)
            temperature: tau, > 0.
            mask: (B,) bool, True where a row counts.
            rows: only the first ``rows`` rows enter the loss. All enter the balance and get codes.
        """
        if rows is not None or self._assigns_otherwise():
            codes = self._own_codes(scores, mask)
            kept, group = mask if mask is None else mask[:rows], self.ranks.active(self.training)
            loss, gradient = prototype_cross_entropy_and_gradient(
                scores[:rows], codes[:rows], temperature, mask=kept, group=group
            )
            return loss, gradient, codes
        return sinkhorn_cross_entropy_and_gradient(
            scores,
            self.epsilon,
            self.num_iters,
            temperature,
            tol=self.tol,
            marginals=self._shares(),
            mask=mask,
            nan_policy=self.nan_policy,
            backend=self.backend,
            group=self.ranks.active(self.training),
        )

    @torch.no_grad()
    def observe(self, scores: Tensor, temperature: float, mask: Tensor | None = None) -> None:
        """Move adaptive marginals a hundredth of the way to the shares that ``scores`` (B, K) show, over all processes.

        The shares are mean responsibilities: the mean of softmax(S / tau + log marginals) over the rows. That is a step
        of EM for the weights of a mixture (Dempster, Laird, Rubin, 1977). The layer calls this in training steps in
        which the prototype loss is at work. Other marginals stay as they are.

        Args:
            mask: (B,) or () bool, True where a row counts. Rows that are not finite do not count.
        """
        marginals = self.marginals
        if not self.adaptive or marginals is None:
            return
        logits = scores.to(marginals.dtype) / temperature + marginals.log()
        usable = logits.isfinite().all(1)
        usable = usable if mask is None else usable & mask
        responsibilities = torch.where(usable[:, None], logits.softmax(1), 0.0)
        both = torch.cat([responsibilities.sum(0), usable.sum(0, keepdim=True).to(marginals.dtype)])
        both = sum_(both, self.ranks.active(self.training))
        sums, count = both[:-1], both[-1]
        target = (1 - self.smoothing) * sums / count.clamp_min(1) + self.smoothing / len(marginals)
        moved = marginals.lerp(target, torch.where(count > 0, RATE, 0.0).to(marginals.dtype))
        marginals.copy_(moved / moved.sum())

    def reset_parameters(self) -> None:
        """Adaptive marginals are uniform again."""
        if self.adaptive and self.marginals is not None:
            self.marginals.fill_(1 / len(self.marginals))

    def _assigns_otherwise(self) -> bool:
        """Whether a subclass has a ``forward`` of its own."""
        return type(self).forward is not SinkhornAssigner.forward

    def _own_codes(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return self(scores) if mask is None else self(scores, mask)

    def extra_repr(self) -> str:
        given = "" if self.marginals is None else f", marginals=({len(self.marginals)},)"
        given = f", marginals={ADAPTIVE!r}, smoothing={self.smoothing:g}" if self.adaptive else given
        tol = "" if self.tol is None else f", tol={self.tol:g}"
        given += f", differentiable={self.differentiable!r}" if self.differentiable else ""
        return f"epsilon={self.epsilon:g}, num_iters={self.num_iters}{tol}{given}"
