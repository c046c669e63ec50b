"""The layer with the signature of vector-quantize-pytorch: change the name of the class, and nothing else.

# vq = VectorQuantize(dim=64, codebook_size=512, accept_image_fmap=True)
vq = VectorPrototypes(dim=64, codebook_size=512, accept_image_fmap=True)
z, indices, loss = vq(encoder(x))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from proto_reg import PrototypicalRegularizer


class VectorPrototypes(nn.Module):
    """Prototypes in the place of a codebook: ``z, indices, loss = vq(z)``.

    A quantiser replaces latents; this module returns them, so the reconstruction loses nothing. ``indices`` say which
    prototype each latent belongs to. In training the latents gather around their prototypes, as N(v, std^2 I) each. In
    ``mode="balanced"`` that happens in the backward pass, and ``loss`` is 0. In ``mode="weighted"`` add ``loss`` to
    your own.

    Args:
        dim: D of the latents, :class:`proto_reg.PrototypicalRegularizer`'s ``latent_dim``.
        codebook_size: K, its ``num_prototypes``.
        channel_last: True for latents (B, N, D), False for (B, D, N). Latents (B, D) work with both.
        accept_image_fmap: latents are maps (B, D, H, W).
        accept_3d_fmap: latents are (B, D, T, H, W).
        options: of :class:`proto_reg.PrototypicalRegularizer`.

    Raises:
        TypeError, ValueError: an argument is out of its range, or both kinds of maps are asked for.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError("accept_3d_fmap: expected False with accept_image_fmap, got True. Choose one.")
        maps = "b d h w" if accept_image_fmap else "b d t h w" if accept_3d_fmap else None
        self.dim, self.codebook_size, self.takes_maps = dim, codebook_size, maps is not None
        self.latent_axis = -1 if maps is None and channel_last else 1
        layout = maps or ("b n d" if channel_last else "b d n")
        self.regularizer = PrototypicalRegularizer(dim, codebook_size, layout=layout, **options)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents ``x``, unchanged; indices, x's shape without D, int64; and a loss ().

        Args:
            x: latents.
            mask: x's shape without D, True where latents count. The others come back as 0, their indices as -1.
            lens: (B,) int64, instead of a mask: the number of latents of each sequence that count, from the first on.

        Raises:
            TypeError, ValueError: latents, mask or lens of another rank, size or dtype, or both mask and lens.
        """
        single = x.ndim == 2 and not self.takes_maps
        if lens is not None:
            mask = self._counted(lens, x, mask)
        if single:
            axis = 1 if self.latent_axis == -1 else 2
            x, mask = x.unsqueeze(axis), None if mask is None else mask.unsqueeze(1)
        z, info = self.regularizer(x, mask)
        loss = info.loss if self.regularizer.mode == "weighted" else info.loss.new_zeros(())
        indices = info.assignments
        if mask is not None:
            z, indices = torch.where(mask.unsqueeze(self.latent_axis), z, 0.0), indices.masked_fill(~mask, -1)
        return (z.squeeze(axis), indices.squeeze(1), loss) if single else (z, indices, loss)

    if TYPE_CHECKING:  # torch's own returns Any

        def __call__(
            self, x: Tensor, *, mask: Tensor | None = None, lens: Tensor | None = None
        ) -> tuple[Tensor, Tensor, Tensor]: ...

    def _counted(self, lens: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N) bool: the first ``lens`` (B,) positions of each sequence of ``x``."""
        if mask is not None:
            raise ValueError("lens: expected None beside a mask, got both. Pass one of them.")
        if x.ndim != 3 or self.takes_maps:
            raise ValueError(f"lens: expected sequences (B, N, D), got latents {tuple(x.shape)}. Pass a mask.")
        if not isinstance(lens, Tensor) or lens.is_floating_point() or lens.dtype == torch.bool:
            came = f"dtype {lens.dtype}" if isinstance(lens, Tensor) else type(lens).__name__
            raise TypeError(f"lens: expected a tensor of ints, got {came}. Pass torch.tensor([...]).")
        if lens.shape != x.shape[:1]:
            raise ValueError(
                f"lens: expected shape ({x.shape[0]},), one for each sequence, got {tuple(lens.shape)}. Pass (B,)."
            )
        positions = x.shape[1 if self.latent_axis == -1 else 2]
        return torch.arange(positions, device=x.device) < lens.to(x.device)[:, None]

    @property
    def codebook(self) -> Tensor:
        """The prototypes (K, D)."""
        return self.regularizer.head.prototypes

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The prototypes at ``indices`` (B, ...), D where the latents have it."""
        return self.codebook[indices].movedim(-1, self.latent_axis if indices.ndim > 1 else -1)

    get_output_from_indices = get_codes_from_indices
