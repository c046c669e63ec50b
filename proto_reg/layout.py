"""Latents in any shape as rows of tokens, and back."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from ._checks import check_floating, check_mask


class Layout:
    """An einops pattern such as ``"b d h w"``. The axis ``d`` is the latent, and each position of the others a token.

    Raises:
        ValueError: a pattern without ``d`` or without another axis, or one that names an axis twice.
    """

    def __init__(self, pattern: str) -> None:
        self.axes = pattern.split() if isinstance(pattern, str) else []
        unique = len(set(self.axes)) == len(self.axes) >= 2
        if "d" not in self.axes or not unique or not all(axis.isidentifier() for axis in self.axes):
            raise ValueError(
                f"layout: expected axis names with one 'd' for the latent, such as 'b d' or 'b d h w', got {pattern!r}."
                " Name every axis of the encoder's output once."
            )
        self.pattern = " ".join(self.axes)
        self.latent_axis = self.axes.index("d")
        self.positions = " ".join(axis for axis in self.axes if axis != "d")
        self.is_rows = self.latent_axis == 1 == len(self.axes) - 1  # nothing to rearrange

    def check_rank(self, z: Tensor) -> None:
        """TypeError or ValueError unless ``z`` is a floating-point tensor with as many axes as the pattern."""
        check_floating("z", z)
        if z.ndim != len(self.axes):
            raise ValueError(
                f"z: expected a {self.pattern!r} tensor, got shape {tuple(z.shape)}. Set layout= to what your encoder "
                "returns."
            )

    def tokens(
        self, z: Tensor, mask: Tensor | None, latent_dim: int, *, empty: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Latents ``z`` as rows (N, D), and ``mask``, z's shape without d, as (N,) or None. ``empty``: N may be 0.

        Raises:
            TypeError, ValueError: latents or mask of another rank, size or dtype, or no latents at all.
        """
        check_floating("z", z)
        if z.ndim != len(self.axes) or z.shape[self.latent_axis] != latent_dim:
            cure = "Set layout= and latent_dim= to what your encoder returns"
            if z.ndim == len(self.axes) and z.shape[self.latent_axis] == 2 * latent_dim:
                cure += f"; of mu and log variance in one tensor pass mu alone (attach: select=slice({latent_dim}))"
            raise ValueError(
                f"z: expected a {self.pattern!r} tensor with d = {latent_dim}, got shape {tuple(z.shape)}. {cure}."
            )
        if z.numel() == 0 and not empty:
            raise ValueError(
                f"z: expected a non-empty tensor, got shape {tuple(z.shape)}. Skip empty batches; only among several "
                "processes one may have none."
            )
        if mask is not None:
            check_mask("mask", mask, tuple(self._sizes(z).values()))
        if self.is_rows:
            return z, mask
        rows = rearrange(z, f"{self.pattern} -> ({self.positions}) d")
        return rows, None if mask is None else rearrange(mask, f"{self.positions} -> ({self.positions})")

    def restore(self, rows: Tensor, like: Tensor) -> Tensor:
        """Rows (N, c), one for each token of ``like``, in its layout with c in the place of d."""
        if self.is_rows:
            return rows
        return rearrange(rows, f"({self.positions}) d -> {self.pattern}", **self._sizes(like))

    def restore_positions(self, entries: Tensor, like: Tensor) -> Tensor:
        """Entries (N,), one for each token of ``like``, in its layout without d."""
        if self.is_rows:
            return entries
        return rearrange(entries, f"({self.positions}) -> {self.positions}", **self._sizes(like))

    def _sizes(self, z: Tensor) -> dict[str, int]:
        return {axis: size for axis, size in zip(self.axes, z.shape, strict=True) if axis != "d"}
