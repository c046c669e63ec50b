"""Balanced assignment of latents to prototypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_number, check_positive_int
from .functional.sinkhorn import BACKENDS, NAN_POLICIES, as_marginals, check_marginals, sinkhorn


class SinkhornAssigner(nn.Module):
    """Codes that share a batch out among the prototypes; see :func:`proto_reg.functional.sinkhorn`.

    Args:
        epsilon: entropic regularisation, > 0, in units of the scores.
        num_iters: Sinkhorn iterations, >= 1.
        tol: stop once every column is within this relative error of its marginal.
        marginals: (K,) share of the batch for each prototype, summing to 1; uniform by default.
        nan_policy: ``"propagate"``, ``"isolate"`` or ``"raise"``.
        backend: ``"auto"`` or ``"torch"``.

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
        marginals: Tensor | Sequence[float] | None = None,
        nan_policy: str = "propagate",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.epsilon = check_number("epsilon", epsilon, above=0)
        self.num_iters = check_positive_int("num_iters", num_iters)
        self.tol = None if tol is None else check_number("tol", tol, above=0)
        self.nan_policy = check_choice("nan_policy", nan_policy, NAN_POLICIES)
        self.backend = check_choice("backend", backend, BACKENDS)
        if marginals is not None:
            marginals = as_marginals(marginals).to(torch.float32)
            check_marginals(marginals, None)
        self.register_buffer("marginals", marginals)

    @torch.no_grad()
    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes (B, K) for ``scores`` (B, K): rows sum to 1, no gradient. ``mask`` (B,) bool leaves rows out."""
        return sinkhorn(
            scores,
            self.epsilon,
            self.num_iters,
            tol=self.tol,
            marginals=self.marginals,
            mask=mask,
            nan_policy=self.nan_policy,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        given = "" if self.marginals is None else f", marginals=({len(self.marginals)},)"
        tol = "" if self.tol is None else f", tol={self.tol:g}"
        return f"epsilon={self.epsilon:g}, num_iters={self.num_iters}{tol}{given}"
