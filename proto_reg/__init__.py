"""Latent spaces organised around prototypes, for any autoencoder: ``z, info = regularizer(encoder(x))``."""

from __future__ import annotations

from . import (
    _torch,  # noqa: F401  (first: it imports torch)
    functional,
)
from ._checks import PrototypeWarning
from .assigner import SinkhornAssigner
from .attachment import Attachment, attach
from .head import PrototypeHead, PrototypeMixture
from .mmd import AnchoredMMDLoss
from .regularizer import PrototypicalRegularizer, RegularizerOutput
from .training import PrototypicalTrainerMixin, PrototypicalTraining

__version__ = "0.1.0"

__all__ = [
    "AnchoredMMDLoss",
    "Attachment",
    "PrototypeHead",
    "PrototypeMixture",
    "PrototypeWarning",
    "PrototypicalRegularizer",
    "PrototypicalTrainerMixin",
    "PrototypicalTraining",
    "RegularizerOutput",
    "SinkhornAssigner",
    "attach",
    "functional",
]
