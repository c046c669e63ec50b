"""What training hands to evaluation: a model as two functions, and the images it is judged on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor

from proto_reg import PrototypeHead


@dataclass(frozen=True)
class ImageData:
    """Pixels in [0, 1], flattened: (N, C*H*W); labels (N,); ``shape`` is (C, H, W).

    ``test`` is whatever the run is judged on: the validation split while tuning, the test split once.
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
        encode: images (B, C*H*W) -> latents (B, D); the mean of a Gaussian posterior, the codebook vector of a
            VQ-VAE. In batches of any size, without gradients.
        decode: latents (B, D) -> images (B, C*H*W) in [0, 1], without gradients.
        sample: (n, generator) -> n images (n, C*H*W) from the method's own prior; a plain autoencoder, which has
            none, samples a Gaussian fitted to its training latents.
        head: the prototypes with their scores, None where the method has none. A k-means' centres count as prototypes.
        posterior: images (B, C*H*W) -> draws (B, D) of a Gaussian posterior; None where the encoder is deterministic.
        bce: binary cross-entropy per pixel on ``data.test_images``, nats.
    """

    method: str
    data: ImageData
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    sample: Callable[[int, Generator], Tensor]
    head: PrototypeHead | None
    bce: float
    posterior: Callable[[Tensor], Tensor] | None = None
