"""The networks that all methods share."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn

MODELS = ("conv", "mlp")


class Network(nn.Module):
    """The features of an image, a linear map from them to the latent, and a decoder from the latent to logits.

    The features end in a ReLU. The latent does not, because ReLU latents cannot follow N(v_k, I).

    Attributes:
        features: images (B, C*H*W) -> (B, width). latent: (B, width) -> (B, D). decoder: (B, D) -> logits (B, C*H*W).
    """

    def __init__(self, features: nn.Module, decoder: nn.Module, width: int, latent_dim: int, pixels: int) -> None:
        super().__init__()
        self.features, self.latent, self.decoder = features, nn.Linear(width, latent_dim), decoder
        self.width, self.latent_dim, self.pixels = width, latent_dim, pixels

    def encode(self, x: Tensor) -> Tensor:
        """The latents (B, D) of images ``x`` (B, C*H*W)."""
        return self.latent(self.features(x))


def build_network(model: str, shape: tuple[int, int, int], latent_dim: int, maps: int, width: int = 256) -> Network:
    """``"conv"`` is the network of the paper's section 3.1 if ``maps`` is 256. ``"mlp"`` is for 8x8 digits.

    Fewer ``maps`` make a narrower network.
    """
    network = _mlp(prod(shape), latent_dim, width) if model == "mlp" else _conv(shape, latent_dim, maps, width)
    for module in network.modules():
        # This is TensorFlow's default, which the paper used. With PyTorch's, the first epoch stays on a plateau.
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return network


def _mlp(pixels: int, latent_dim: int, width: int) -> Network:
    features = nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    decoder = nn.Sequential(
        nn.Linear(latent_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, pixels)
    )
    return Network(features, decoder, width, latent_dim, pixels)


def _conv(shape: tuple[int, int, int], latent_dim: int, maps: int, width: int) -> Network:
    """Two convolution blocks for MNIST, or three for CIFAR, and a dense bottleneck. Two blocks halve the image.

    The decoder starts from ``maps`` maps of 7 x 7 (4 x 4 for CIFAR). Transposed convolutions double their size, and
    each one halves the number of maps. The last convolution has a map for each colour. The paper does not say the
    other widths. Here they mirror the decoder's.
    """
    channels, height, side = shape
    small = side == 28
    start, ups = (7, 2) if small else (4, 3)
    if height != side or start * 2**ups != side:
        raise ValueError(f"model: expected images of 28 x 28 or 32 x 32 for 'conv', got {height} x {side}. Use 'mlp'.")
    widths = [maps // 4, maps // 2] if small else [maps // 4, maps // 2, maps]
    layers: list[nn.Module] = [nn.Unflatten(1, shape)]
    for i, (before, after) in enumerate(zip([channels, *widths], widths, strict=False)):
        layers += [nn.Conv2d(before, after, 3, stride=2 if i < 2 else 1, padding=1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(widths[-1] * (side // 4) ** 2, width), nn.ReLU()]

    decoder: list[nn.Module] = [
        nn.Linear(latent_dim, maps * start**2),
        nn.ReLU(),
        nn.Unflatten(1, (maps, start, start)),
    ]
    for i in range(ups):
        decoder += [nn.ConvTranspose2d(maps >> i, maps >> (i + 1), 4, stride=2, padding=1), nn.ReLU()]
    decoder += [nn.Conv2d(maps >> ups, channels, 3, padding=1), nn.Flatten()]
    return Network(nn.Sequential(*layers), nn.Sequential(*decoder), width, latent_dim, prod(shape))
