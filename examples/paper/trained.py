"""The results that evaluation gets from training: a model as functions, and the images that judge it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor

from proto_reg import PrototypeHead


@dataclass(frozen=True)
class ImageData:
    """Flattened pixels in [0, 1] (N, C*H*W) and labels (N,). ``shape`` is (C, H, W).

    ``test`` holds the images that judge the run. They are the validation split for tuning, and the test split once.
    """

    name: str
    shape: tuple[int, int, int]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class TrainedRun:
    """A trained model of any method, in evaluation mode.

    Attributes:
        method: the registry's name of the method ("autoencoder", "vae-kl", ...).
        encode: images (B, C*H*W) -> latents (B, D). These are the means of a Gaussian posterior, or the codebook
            vectors of a VQ-VAE. Batches may have any size. There are no gradients.
        decode: latents (B, D) -> images (B, C*H*W) in [0, 1], without gradients.
        sample: (n, generator) -> n images (n, C*H*W) from the method's own prior. A plain autoencoder has no prior. It
            uses a Gaussian that is fitted to its training latents.
        head: the prototypes with their scores, or None. The centres of k-means count as prototypes.
        posterior: images (B, C*H*W) -> draws (B, D) of a Gaussian posterior. None for a deterministic encoder.
        bce: binary cross-entropy per pixel on ``data.test_images``, in nats.
    """

    method: str
    data: ImageData
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    sample: Callable[[int, Generator], Tensor]
    head: PrototypeHead | None
    bce: float
    posterior: Callable[[Tensor], Tensor] | None = None
