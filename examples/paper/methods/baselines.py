"""The methods that the prototypical methods are compared with."""

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
    """A plain autoencoder. Its prototypes are the centres of k-means on its training latents."""

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
        # With Euclidean scores, the nearest centre has the highest score.
        centres = PrototypeHead(z.shape[1], self.num_prototypes, similarity="euclidean")
        centres.place(slice(None), torch.from_numpy(fitted.cluster_centers_))
        self.__dict__["centres"] = centres  # no parameter of the trained model

    def prior(self, n: int, generator: Generator) -> Tensor:
        return self.head.sample(n, generator=generator)


class RAE(Method):
    """RAE-L2 (Ghosh et al., 2020): an L2 penalty on the latents, and weight decay on the decoder, from the first step.

    ``beta`` and ``decay`` are in the units of their program: the error is a mean over pixels, the penalty is
    ``beta`` times the mean of z^2 over D, and ``decay`` multiplies the decoder's summed squared weights, without
    biases. Our error is summed over pixels, so both are multiplied by the number of pixels here. It is a cross-entropy
    in place of their squared error. The defaults are their values for CIFAR-10. For MNIST they have a tenth of both,
    which is worse here: on validation images the MSE is .00358 instead of .00325, and the FID 10.4 instead of 9.8.
    """

    trained_as = "rae"

    def __init__(self, network: Network, plan: Plan, *, beta: float = 1e-3, decay: float = 1e-6) -> None:
        super().__init__(network, plan)
        self.beta, self.decay = float(beta), float(decay)

    def loss(self, x: Tensor) -> Tensor:
        z = self.network.encode(x)
        weights = sum(p.square().sum() for p in self.network.decoder.parameters() if p.ndim > 1)
        penalty = self.beta * z.square().mean() + self.decay * weights
        return reconstruction(self.network.decoder(z), x) + self.network.pixels * penalty


class StandardPrior(Method):
    """Methods that sample from N(0, I)."""

    def prepare(self, z: Tensor) -> None:
        self.latent_dim = z.shape[1]

    def prior(self, n: int, generator: Generator) -> Tensor:
        return torch.randn(n, self.latent_dim, generator=generator)


class VAE(StandardPrior):
    """VAE-KL and beta-VAE: -ELBO with the KL term times ``beta``, both terms summed over their dimensions.

    ``beta="pixels"`` is the number of pixels, 784 on MNIST. A mean of the cross-entropy over pixels with a summed KL
    term has the same effect.
    """

    trained_as = "vae"

    def __init__(self, network: Network, plan: Plan, *, beta: float | str = 1.0) -> None:
        super().__init__(network, plan)
        if isinstance(beta, str) and beta != "pixels":
            raise ValueError(f"beta: expected a number >= 0 or 'pixels', got {beta!r}. Pass one of them.")
        self.beta = network.pixels if beta == "pixels" else float(beta)
        self.logvar = nn.Linear(network.width, network.latent_dim)

    def sample_posterior(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, mu and the log variance. Each has the shape (B, D)."""
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

    Zhao et al., 2017, use a Gaussian kernel exp(-d^2 / D^2) with a sampled target and a V-statistic. Its ``scales`` are
    (D / 2,). Its ``weight`` is of the order of 1000.
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
    """WAE-MMD (Tolstikhin et al., 2018): a deterministic encoder and a U-statistic with inverse multiquadratics.

    They add up kernels of seven scales and give the sum a weight of 10 on MNIST. Here the kernel is the mean of the
    seven, so the ``weight`` is 70. With ``warmup=False``, as in their training, the MMD acts from the first step.
    Otherwise it acts after the warm-up of all other methods. With ``noise``, the decoder gets noise as in ours, in all
    epochs except the last. See :func:`proto_reg.functional.with_noise`.
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
    """MMD^2 between latents (B, D) and the same number of draws of N(0, I). It has one cluster around the origin."""
    origin, assignments = z.new_zeros(1, z.shape[1]), torch.zeros(len(z), dtype=torch.int64, device=z.device)
    return functional.anchored_mmd(z, origin, assignments, target="sampled", **options)


class VQVAE(Method):
    """VQ-VAE by vector-quantize-pytorch. It cuts the latent into ``groups`` vectors with one codebook of ``codes``.

    Sampling draws each position on its own. A code is as frequent as in the training images at this position. VQ-VAE's
    published samples need an additional autoregressive prior.
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
            # The library takes a mean over dimensions. This factor brings it to the scale of the sum over an image.
            commitment_weight=commitment * network.latent_dim,
        )

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The quantised latents (B, D), the indices (B, groups) and the commitment loss ()."""
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
        # The quantised latents by position, with a row for each training image.
        self.used = rearrange(z, "b (n d) -> b n d", n=self.groups)

    def prior(self, n: int, generator: Generator) -> Tensor:
        rows = torch.randint(len(self.used), (n, self.groups), generator=generator)
        return rearrange(self.used[rows, torch.arange(self.groups)], "b n d -> b (n d)")
