"""What the prototypical methods are compared with."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Generator, Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from proto_reg import PrototypeHead, functional

from ..models import Network
from .method import Method, Plan, reconstruction


class Autoencoder(Method):
    trained_as = "autoencoder"


class KMeans(Autoencoder):
    """A plain autoencoder whose prototypes are the centres of a k-means on its training latents."""

    def __init__(self, network: Network, plan: Plan, *, num_prototypes: int) -> None:
        super().__init__(network, plan)
        self.num_prototypes = num_prototypes

    @classmethod
    def training_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {}

    @property
    def head(self) -> PrototypeHead:
        return self.centres

    def prepare(self, z: Tensor) -> None:
        fitted = SklearnKMeans(self.num_prototypes, n_init=3, random_state=self.plan.seed).fit(z[:20_000].numpy())
        # Euclidean scores: the nearest centre has the highest.
        centres = PrototypeHead(z.shape[1], self.num_prototypes, similarity="euclidean")
        centres.place(slice(None), torch.from_numpy(fitted.cluster_centers_))
        self.__dict__["centres"] = centres  # no parameter of the model that was trained

    def prior(self, n: int, generator: Generator) -> Tensor:
        return self.head.sample(n, generator=generator)


class StandardPrior(Method):
    """N(0, I) at sampling."""

    def prepare(self, z: Tensor) -> None:
        self.latent_dim = z.shape[1]

    def prior(self, n: int, generator: Generator) -> Tensor:
        return torch.randn(n, self.latent_dim, generator=generator)


class VAE(StandardPrior):
    """VAE-KL and beta-VAE: -ELBO with the KL term times ``beta``, both terms summed over their dimensions.

    ``beta="pixels"`` is what cross-entropy averaged over pixels beside a summed KL term amounts to: 784 on MNIST.
    """

    trained_as = "vae"

    def __init__(self, network: Network, plan: Plan, *, beta: float | str = 1.0) -> None:
        super().__init__(network, plan)
        if isinstance(beta, str) and beta != "pixels":
            raise ValueError(f"beta: expected a number >= 0 or 'pixels', got {beta!r}. Pass one of them.")
        self.beta = network.pixels if beta == "pixels" else float(beta)
        self.logvar = nn.Linear(network.width, network.latent_dim)

    def sample_posterior(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, mu and log variance, each (B, D)."""
        h = self.network.features(x)
        mu, logvar = self.network.latent(h), self.logvar(h)
        return mu + (0.5 * logvar).exp() * torch.randn_like(mu), mu, logvar

    def loss(self, x: Tensor) -> Tensor:
        z, mu, logvar = self.sample_posterior(x)
        loss = reconstruction(self.network.decoder(z), x)
        if self.warm:
            loss = loss - 0.5 * self.beta * (1 + logvar - mu.square() - logvar.exp()).sum() / len(x)
        return loss


class InfoVAE(VAE):
    """MMD between the aggregate posterior and N(0, I) instead of the KL term (InfoVAE with alpha = 1).

    Zhao et al., 2017: a Gaussian kernel exp(-d^2 / D^2), that is ``scales`` (D / 2,), with a sampled target and a
    V-statistic, times a ``weight`` of the order of 1000.
    """

    trained_as = "infovae"

    def __init__(self, network: Network, plan: Plan, *, weight: float = 1000.0) -> None:
        super().__init__(network, plan)
        self.weight = float(weight)

    def loss(self, x: Tensor) -> Tensor:
        z, _, _ = self.sample_posterior(x)
        loss = reconstruction(self.network.decoder(z), x)
        scale = self.network.latent_dim / 2
        return loss + self.weight * mmd_to_prior(z, scales=(scale,), statistic="biased") if self.warm else loss


class WAE(StandardPrior):
    """WAE-MMD (Tolstikhin et al., 2018): a deterministic encoder, inverse multiquadratics of seven scales, U-statistic.

    They add the seven up and weigh them by 10 on MNIST; ours is their mean: ``weight`` 70. ``warmup=False``, as they
    train it: the MMD acts from the first step, and not after the warm-up of all the others. ``noise``: the decoder gets
    it as ours does, in all epochs but the last, see :func:`proto_reg.functional.with_noise`.
    """

    trained_as = "wae"
    SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

    def __init__(
        self, network: Network, plan: Plan, *, weight: float = 70.0, warmup: bool = True, noise: float = 0.0
    ) -> None:
        super().__init__(network, plan)
        self.weight, self.warmup, self.noise = float(weight), warmup, float(noise)

    @property
    def warm(self) -> bool:
        return not self.warmup or super().warm

    def loss(self, x: Tensor) -> Tensor:
        z = self.network.encode(x)
        noise = self.noise if self.training and self.warm and self.epoch < self.plan.epochs - 1 else 0.0
        loss = reconstruction(self.network.decoder(functional.with_noise(z, noise) if noise else z), x)
        return loss + self.weight * mmd_to_prior(z, kernel="imq", scales=self.SCALES) if self.warm else loss


def mmd_to_prior(z: Tensor, **options: Any) -> Tensor:
    """MMD^2 between latents (B, D) and as many draws of N(0, I): one cluster around the origin."""
    origin, assignments = z.new_zeros(1, z.shape[1]), torch.zeros(len(z), dtype=torch.int64, device=z.device)
    return functional.anchored_mmd(z, origin, assignments, target="sampled", **options)


class VQVAE(Method):
    """VQ-VAE by vector-quantize-pytorch: the latent cut into ``groups`` vectors, each from one codebook of ``codes``.

    At sampling each position is drawn by itself, as often as training images use each code there: VQ-VAE's published
    samples need an autoregressive prior trained on top.
    """

    trained_as = "vq-vae"

    def __init__(
        self, network: Network, plan: Plan, *, groups: int = 16, codes: int = 512, commitment: float = 0.25
    ) -> None:
        super().__init__(network, plan)
        if network.latent_dim % groups:
            raise ValueError(f"groups: expected a divisor of {network.latent_dim}, got {groups}. Change one of them.")
        self.groups = groups
        self.quantizer = VectorQuantize(
            network.latent_dim // groups,
            codes,
            decay=0.99,
            kmeans_init=True,
            threshold_ema_dead_code=2,
            # The library's mean over dimensions, brought to the reconstruction's scale, the sum of an image.
            commitment_weight=commitment * network.latent_dim,
        )

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, D) quantised, (B, groups) indices, commitment loss ()."""
        quantized, indices, loss = self.quantizer(rearrange(z, "b (n d) -> b n d", n=self.groups))
        return rearrange(quantized, "b n d -> b (n d)"), indices, loss.sum()

    def loss(self, x: Tensor) -> Tensor:
        z, commitment = self.network.encode(x), 0.0
        if self.warm:
            z, _, commitment = self.quantize(z)
        return reconstruction(self.network.decoder(z), x) + commitment

    def encode(self, x: Tensor) -> Tensor:
        z = self.network.encode(x)
        return self.quantize(z)[0] if self.warm else z

    def prepare(self, z: Tensor) -> None:
        # Of quantised latents, by position: a row for each training image.
        self.used = rearrange(z, "b (n d) -> b n d", n=self.groups)

    def prior(self, n: int, generator: Generator) -> Tensor:
        rows = torch.randint(len(self.used), (n, self.groups), generator=generator)
        return rearrange(self.used[rows, torch.arange(self.groups)], "b n d -> b (n d)")
