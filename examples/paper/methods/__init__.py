"""The compared methods. Each one is a class with the same interface and the same network.

All minimise the binary cross-entropy of the reconstruction with Adam. It is summed over pixels and averaged over the
batch, as in the ELBO. A method's own terms begin after the warm-up, unless the method says otherwise.
"""

from __future__ import annotations

from typing import Any

from ..models import Network
from .baselines import RAE, VAE, VQVAE, WAE, Autoencoder, InfoVAE, KMeans
from .method import Method, Plan, inference
from .prototypical import Algorithm1, Balanced

__all__ = ["METHODS", "Method", "Plan", "build_method", "inference"]

METHODS: dict[str, type[Method]] = {
    "autoencoder": Autoencoder,
    "kmeans": KMeans,
    "rae": RAE,
    "vae": VAE,
    "infovae": InfoVAE,
    "wae": WAE,
    "vq-vae": VQVAE,
    "algorithm1": Algorithm1,
    "balanced": Balanced,
}


def build_method(name: str, network: Network, plan: Plan, options: dict[str, Any]) -> Method:
    """Build the method ``name`` on ``network``. Options that it does not take raise TypeError or ValueError."""
    method = METHODS[name](network, plan, **options)
    method.add_optimizers()
    return method
