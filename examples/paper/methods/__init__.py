"""The methods that are compared: one class each, behind one interface, on one network.

All reconstruct by binary cross-entropy, summed over pixels and averaged over the batch (as in the ELBO), by Adam.
What a method adds begins after the warm-up, except where it says otherwise.
"""

from __future__ import annotations

from typing import Any

from ..models import Network
from .baselines import VAE, VQVAE, WAE, Autoencoder, InfoVAE, KMeans
from .method import Method, Plan, inference
from .prototypical import Algorithm1, Balanced

__all__ = ["METHODS", "Method", "Plan", "build_method", "inference"]

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
