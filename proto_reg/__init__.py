"""Latent spaces organised around prototypes, for any autoencoder: ``z, info = regularizer(encoder(x))``."""

from __future__ import annotations

from . import (
    _torch,  # noqa: F401  (first: it imports torch)
    functional,
)
from ._checks import PrototypeWarning
from .assigner import SinkhornAssigner
from .attachment import Attachment, attach
from .head import PrototypeHead
from .mixture import PrototypeMixture
from .mmd import AnchoredMMDLoss
from .noise import LatentNoise
from .output import RegularizerOutput
from .queue import LatentQueue
from .regularizer import PrototypicalRegularizer
from .schedule import Schedule
from .training import PrototypicalTrainerMixin, PrototypicalTraining

__version__ = "0.1.0"

__all__ = [
    "AnchoredMMDLoss",
    "Attachment",
    "LatentNoise",
    "LatentQueue",
    "PrototypeHead",
    "PrototypeMixture",
    "PrototypeWarning",
    "PrototypicalRegularizer",
    "PrototypicalTrainerMixin",
    "PrototypicalTraining",
    "RegularizerOutput",
    "Schedule",
    "SinkhornAssigner",
    "attach",
    "functional",
]
