"""Noise for a decoder to tolerate."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_floating, check_mask, check_number, compute_dtype


def with_noise(z: Tensor, size: Tensor | float, *, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """``z + size |z| / sqrt(D) e``, e ~ N(0, I) drawn from torch's random state.

    Noise on its input smooths a network (Bishop, 1995: it is Tikhonov regularisation). The noise is relative to each
    latent's length, and gradients flow through that length. So the scale of latents stays: latents would escape a noise
    of constant size by growing.

    Args:
        z: (..., D); ``dim`` says which axis the latents lie along.
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
    elif size.ndim:
        raise ValueError(f"size: expected a number or a () tensor, got shape {tuple(size.shape)}. Pass one for all.")
    if z.ndim == 0 or not -z.ndim <= dim < z.ndim:
        raise ValueError(f"dim: expected an axis of z, which has {z.ndim}, got {dim}. Pass that of the latents.")
    dim %= z.ndim
    check_mask("mask", mask, z.shape[:dim] + z.shape[dim + 1 :])
    # Left-out latents become 0 first: the length of a NaN has a NaN for its gradient, even if nothing uses it.
    counted = z if mask is None else torch.where(mask.unsqueeze(dim), z, 0.0)
    counted = counted.to(compute_dtype(z.dtype))
    length = torch.linalg.vector_norm(counted, dim=dim, keepdim=True)
    return z + (size * max(z.shape[dim], 1) ** -0.5 * length * torch.randn_like(counted)).to(z.dtype)
