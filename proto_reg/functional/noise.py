"""Noise for a decoder to tolerate."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_floating, check_mask, check_number


def with_noise(z: Tensor, size: Tensor | float, *, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """``z + size |z| / sqrt(D) e``, e ~ N(0, I) drawn from torch's random state.

    Noise on what a network takes smooths it (Bishop, 1995: it is Tikhonov regularisation). Relative to each latent's
    length, through which gradients flow too, it leaves the scale of latents alone; a noise of constant size is escaped
    by larger latents.

    Args:
        z: (..., D), or with the latents along another ``dim``.
        size: the noise's share of a latent's length, a number >= 0 or a () tensor.
        mask: z's shape without ``dim``, True where noise is added.

    Returns:
        Shape and dtype of z.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """
    check_floating("z", z)
    if not isinstance(size, Tensor):
        check_number("size", size, at_least=0)
    if z.ndim == 0 or not -z.ndim <= dim < z.ndim:
        raise ValueError(f"dim: expected an axis of z, which has {z.ndim}, got {dim}. Pass that of the latents.")
    length = torch.linalg.vector_norm(z, dim=dim, keepdim=True)
    check_mask("mask", mask, tuple(length.squeeze(dim).shape))
    deviation = (size * z.shape[dim] ** -0.5 * length).to(z.dtype)
    if mask is not None:
        deviation = torch.where(mask.unsqueeze(dim), deviation, 0.0)
    return z + deviation * torch.randn_like(z)
