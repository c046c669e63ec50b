"""The shape of each prototype's cluster: learned by ``head.fit``, or from the last latents of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_positive_int
from ._state import WideState
from .mixture import ClusterShapes, fit_shapes
from .recent import RecentLatents

FITTED = (*ClusterShapes._fields, "seen")  # what a fit leaves behind


class Derived(NamedTuple):
    """``shapes`` of the ring for ``prototypes`` (K, D), when so many latents had been ``written``."""

    written: int
    prototypes: Tensor
    shapes: ClusterShapes


class Clusters(WideState):
    """What a head knows of the shapes of its clusters.

    Shapes come from :meth:`fit`, or from the last latents of training as soon as these are as many. They are computed
    when they are asked for. In ``state_dict`` are the shapes of :meth:`fit` and the last latents.

    Args:
        latent_dim: D.
        covariance: ``"low_rank"``: ``rank`` leading directions and a diagonal; ``"full"``; or ``"diagonal"``.
    """

    seen: Tensor | None

    def __init__(self, latent_dim: int, covariance: str, rank: int) -> None:
        super().__init__()
        self.covariance = covariance
        self.rank = check_positive_int("rank", rank)
        self.recent = RecentLatents(latent_dim)
        for name in FITTED:
            self.register_buffer(name, None)
        self._derived: Derived | None = None

    @property
    def fitted(self) -> ClusterShapes | None:
        """What :meth:`fit` learned; None before."""
        found: list[Any] = [getattr(self, name) for name in ClusterShapes._fields]
        return None if self.seen is None else ClusterShapes(*found)

    def fit(self, z: Tensor, scores: Tensor, prototypes: Tensor, dtype: torch.dtype) -> None:
        """Learn the shapes from latents ``z`` (N, D) with ``scores`` (N, K), kept in ``dtype``. Forget the ring."""
        for name, value in self._fit(z, scores, prototypes, dtype)._asdict().items():
            setattr(self, name, value)
        self.seen = torch.tensor(len(z), dtype=torch.int64, device=prototypes.device)
        self.recent.reset_parameters()

    def shapes(
        self, prototypes: Tensor, scores_of: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> ClusterShapes | None:
        """The newest shapes for ``prototypes`` (K, D); None if there are none. Reads from the device.

        ``scores_of``: latents (n, D) -> scores (n, K).
        """
        written, fitted = int(self.recent.count), self.fitted
        there, enough = min(written, len(self.recent.latents)), 2 * len(prototypes)
        if self.seen is not None:
            enough = min(int(self.seen), len(self.recent.latents))
        if there < enough:
            return fitted
        known = self._derived
        if known is None or known.written != written or not torch.equal(known.prototypes, prototypes):
            z = self.recent.filled().to(prototypes.device)
            if len(z) == 0:
                return fitted
            shapes = self._fit(z, scores_of(z.to(dtype)), prototypes, dtype)
            self._derived = known = Derived(written, prototypes.clone(), shapes)
        return known.shapes

    def _fit(self, z: Tensor, scores: Tensor, prototypes: Tensor, dtype: torch.dtype) -> ClusterShapes:
        rank = {"low_rank": self.rank, "full": None, "diagonal": 0}[self.covariance]
        shapes = fit_shapes(z, scores.argmax(1), prototypes, rank)
        return ClusterShapes(*(value.to(prototypes.device, dtype) for value in shapes))

    def reset_parameters(self) -> None:
        """Forget :meth:`fit` and the last latents."""
        for name in FITTED:
            setattr(self, name, None)
        self._derived = None
        self.recent.reset_parameters()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Make room for the shapes of the state, or have none if it has none."""
        self._derived = None
        for name in FITTED:
            saved = state_dict.get(prefix + name)
            setattr(self, name, torch.empty_like(saved) if isinstance(saved, Tensor) else None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"covariance={self.covariance!r}, rank={self.rank}"
