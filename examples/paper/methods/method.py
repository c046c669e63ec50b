"""The interface of all methods, and the loss that they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from proto_reg import PrototypeHead

from ..models import Network


class Plan(NamedTuple):
    """The facts that a run knows about its own training."""

    epochs: int
    warmup_epochs: int
    steps_per_epoch: int
    batch_size: int
    learning_rate: float
    seed: int


def reconstruction(logits: Tensor, x: Tensor) -> Tensor:
    """The binary cross-entropy in nats per image."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


class Method(nn.Module):
    """The plain autoencoder. It is also the interface of all other methods.

    A subclass overrides :meth:`loss`, or :meth:`step` if it has several optimizers. It also overrides those of
    :meth:`encode`, :meth:`prepare`, :meth:`prior` and :attr:`head` that differ. ``state_dict`` holds everything for
    inference.

    Attributes:
        trained_as: the name of the method with the same training. k-means is a plain autoencoder until it is judged.
        optimizers: the optimizers by the names of their steps. :meth:`add_optimizers` fills it.
    """

    trained_as: ClassVar[str]

    def __init__(self, network: Network, plan: Plan) -> None:
        super().__init__()
        self.network, self.plan = network, plan
        self.epoch = 0
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    @classmethod
    def training_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The part of ``options`` that changes the training."""
        return options

    def adam(self, parameters: list[nn.Parameter]) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=self.plan.learning_rate)

    def add_optimizers(self) -> None:
        """Add the optimizers. All parameters must exist."""
        self.optimizers = {"all": self.adam(list(self.parameters()))}

    @property
    def head(self) -> PrototypeHead | None:
        """The prototypes, or None."""
        return None

    @property
    def warm(self) -> bool:
        """Whether this epoch is after the warm-up."""
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
        """The latents (B, D) of ``x`` at inference. The decoder takes them."""
        return self.network.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """The images (B, C*H*W) in [0, 1]."""
        return self.network.decoder(z).sigmoid()

    def prepare(self, z: Tensor) -> None:
        """Fit the parts that are not trained to the training latents ``z`` (N, D) on the CPU."""
        self.mean, centred = z.mean(0), (z - z.mean(0)).double()
        # This uses eigenvalues instead of Cholesky, because dead latents have eigenvalues of 0.
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(z))
        self.factor = (vectors * values.clamp_min(0).sqrt()).float()

    def prior(self, n: int, generator: Generator) -> Tensor:
        """``n`` latents (n, D) from the method's prior, on the CPU: here, a Gaussian fitted to the training latents."""
        return self.mean + torch.randn(n, len(self.mean), generator=generator) @ self.factor.T


@contextmanager
def inference(method: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients."""
    training = method.training
    method.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        method.train(training)
