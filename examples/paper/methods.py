"""The methods that are compared: one class each, behind one interface, on one network.

All reconstruct by binary cross-entropy, summed over pixels and averaged over the batch (as in the ELBO), by Adam.
What a method adds begins after the warm-up, except where it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Generator, Tensor, nn
from vector_quantize_pytorch import VectorQuantize

import proto_reg
from proto_reg import PrototypeHead, PrototypicalRegularizer, PrototypicalTraining, functional

from .models import Network


class Plan(NamedTuple):
    """What a run knows of its own training."""

    warmup_epochs: int
    steps_per_epoch: int
    learning_rate: float
    seed: int


def reconstruction(logits: Tensor, x: Tensor) -> Tensor:
    """Binary cross-entropy, nats an image."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


class Method(nn.Module):
    """The plain autoencoder, and the interface of all others.

    A subclass overrides :meth:`loss` (or, with several optimizers, :meth:`step`) and whichever of :meth:`encode`,
    :meth:`prepare`, :meth:`prior` and :attr:`head` differs. ``state_dict`` holds what inference needs.

    Attributes:
        trained_as: name of the method whose training this one's is; k-means is a plain autoencoder until it is judged.
        optimizers: by the name of the step each takes; filled by :meth:`add_optimizers`.
    """

    trained_as: ClassVar[str]

    def __init__(self, network: Network, plan: Plan) -> None:
        super().__init__()
        self.network, self.plan = network, plan
        self.epoch = 0
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    @classmethod
    def training_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Those of ``options`` that training depends on."""
        return options

    def adam(self, parameters: list[nn.Parameter]) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=self.plan.learning_rate)

    def add_optimizers(self) -> None:
        """Once all parameters are there."""
        self.optimizers = {"all": self.adam(list(self.parameters()))}

    @property
    def head(self) -> PrototypeHead | None:
        """The prototypes, where there are any."""
        return None

    @property
    def warm(self) -> bool:
        """Whether this epoch comes after the warm-up."""
        return self.epoch >= self.plan.warmup_epochs

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def loss(self, x: Tensor) -> Tensor:
        return reconstruction(self.network.decoder(self.network.encode(x)), x)

    def step(self, x: Tensor) -> None:
        """Train on one batch (B, C*H*W)."""
        optimizer = self.optimizers["all"]
        loss = self.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def encode(self, x: Tensor) -> Tensor:
        """The latents (B, D) that stand for ``x`` at inference, which the decoder takes."""
        return self.network.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C*H*W) in [0, 1]."""
        return self.network.decoder(z).sigmoid()

    def prepare(self, z: Tensor) -> None:
        """Fit to the training latents ``z`` (N, D), on the CPU, what is no part of training."""
        self.mean, centred = z.mean(0), (z - z.mean(0)).double()
        # By eigenvalues, not Cholesky: dead latents have none above 0.
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(z))
        self.factor = (vectors * values.clamp_min(0).sqrt()).float()

    def prior(self, n: int, generator: Generator) -> Tensor:
        """``n`` latents (n, D) from the method's prior, on the CPU; here a Gaussian fitted to the training latents."""
        return self.mean + torch.randn(n, len(self.mean), generator=generator) @ self.factor.T


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
        centres = PrototypeHead(z.shape[1], self.num_prototypes, scores="euclidean")
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

    They add the seven up and weigh them by 10 on MNIST; ours is their mean: ``weight`` 70.
    """

    trained_as = "wae"
    SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

    def __init__(self, network: Network, plan: Plan, *, weight: float = 70.0) -> None:
        super().__init__(network, plan)
        self.weight = float(weight)

    def loss(self, x: Tensor) -> Tensor:
        z = self.network.encode(x)
        loss = reconstruction(self.network.decoder(z), x)
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


class Prototypical(Method):
    """What the layer's methods share: its construction from the options of a config.

    Options: ``num_prototypes``; ``preset`` "ours" (the library's defaults) or "paper"; ``sigma``, one Gaussian
    bandwidth in the units of the latents instead of the preset's; any argument of
    :class:`proto_reg.PrototypicalRegularizer`, with mappings for ``head``, ``assigner`` and ``mmd``.
    """

    PARTS: ClassVar[dict[str, Callable[..., nn.Module]]] = {
        "assigner": proto_reg.SinkhornAssigner,
        "mmd": proto_reg.AnchoredMMDLoss,
    }

    def __init__(
        self,
        network: Network,
        plan: Plan,
        *,
        num_prototypes: int,
        preset: str,
        sigma: float | None = None,
        head: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, plan)
        if preset not in ("ours", "paper"):
            raise ValueError(f"preset: expected 'ours' or 'paper', got {preset!r}. Choose one.")
        build = PrototypicalRegularizer.paper if preset == "paper" else PrototypicalRegularizer
        if sigma is not None:
            paper = {"target": "sampled", "statistic": "biased", "reduction": "sum"} if preset == "paper" else {}
            options["mmd"] = paper | options.get("mmd", {}) | {"scales": [float(sigma) ** 2 / network.latent_dim]}
        options |= {name: part(**options[name]) for name, part in self.PARTS.items() if name in options}
        if head is not None:
            options["head"] = PrototypeHead(network.latent_dim, num_prototypes, **head)
        self.regularizer = build(network.latent_dim, num_prototypes, **options)

    @property
    def head(self) -> PrototypeHead:
        return self.regularizer.head

    def prepare(self, z: Tensor) -> None:
        """The prior is there: the mixture around the prototypes."""

    def prior(self, n: int, generator: Generator) -> Tensor:
        return deepcopy(self.head).cpu().sample(n, generator=generator)


class Balanced(Prototypical):
    """Ours: the layer between encoder and decoder, one optimizer, one backward pass.

    With the warm-up of all the others; ``warmup=False`` leaves it out, as the library does unless it is told.
    """

    trained_as = "balanced"

    def __init__(
        self, network: Network, plan: Plan, *, preset: str = "ours", warmup: bool = True, **options: Any
    ) -> None:
        if warmup:
            options["warmup_steps"] = plan.warmup_epochs * plan.steps_per_epoch
        super().__init__(network, plan, preset=preset, **options)

    def loss(self, x: Tensor) -> Tensor:
        z, info = self.regularizer(self.network.encode(x))
        loss = reconstruction(self.network.decoder(z), x)
        return loss if self.regularizer.mode == "balanced" else loss + info.loss


class Algorithm1(Prototypical):
    """The paper's three optimizers, by :class:`proto_reg.PrototypicalTraining`."""

    trained_as = "algorithm1"

    def __init__(self, network: Network, plan: Plan, *, preset: str = "paper", **options: Any) -> None:
        super().__init__(network, plan, preset=preset, **options)
        training = PrototypicalTraining(
            nn.Sequential(network.features, network.latent),
            network.decoder,
            self.regularizer,
            reconstruction=reconstruction,
            warmup_epochs=plan.warmup_epochs,
            schedule="paper",
            optimizer=self.adam,
        )
        self.__dict__["training_loop"] = training  # not a submodule: its parts are registered already

    def add_optimizers(self) -> None:
        self.optimizers = self.training_loop.optimizers

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self.training_loop.epoch = epoch

    def step(self, x: Tensor) -> None:
        self.training_loop.step(x)
        if self.training_loop.skipped_steps:
            raise FloatingPointError("a gradient of Algorithm 1 is not finite")


METHODS: dict[str, type[Method]] = {
    "autoencoder": Autoencoder,
    "kmeans": KMeans,
    "vae": VAE,
    "infovae": InfoVAE,
    "wae": WAE,
    "vq-vae": VQVAE,
    "algorithm1": Algorithm1,
    "balanced": Balanced,
}


def build_method(name: str, network: Network, plan: Plan, options: dict[str, Any]) -> Method:
    """The method ``name`` on ``network``. TypeError or ValueError for options it does not take."""
    method = METHODS[name](network, plan, **options)
    method.add_optimizers()
    return method


@contextmanager
def inference(method: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients."""
    training = method.training
    method.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        method.train(training)
