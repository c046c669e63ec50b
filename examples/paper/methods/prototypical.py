"""The methods of this library: the paper's Algorithm 1, and the balanced layer."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar

from torch import Generator, Tensor, nn

import proto_reg
from proto_reg import LatentNoise, LatentQueue, PrototypeHead, PrototypicalRegularizer, PrototypicalTraining, Schedule

from ..models import Network
from .method import Method, Plan, reconstruction


class Prototypical(Method):
    """The common part of the methods with the layer. It builds the layer from the options of a config.

    It has these options. ``num_prototypes``. ``preset`` is "ours" (the library's defaults) or "paper". ``sigma`` is one
    Gaussian bandwidth in the units of the latents. It replaces the preset's bandwidths. All arguments of
    :class:`proto_reg.PrototypicalRegularizer` are options, too. ``head``, ``assigner`` and ``mmd`` are mappings. The
    schedule's arguments are at the same level, and ``prototype_warmup_steps`` is its ``mmd_steps``.
    """

    SCHEDULE: ClassVar[dict[str, str]] = {
        "warmup_steps": "warmup_steps",
        "prototype_warmup_steps": "mmd_steps",
        "ramp_steps": "ramp_steps",
        "temperature": "temperature",
    }

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
        timed = {self.SCHEDULE[name]: options.pop(name) for name in list(options) if name in self.SCHEDULE}
        if timed:
            options["schedule"] = Schedule(**timed)
        options |= {name: part(**options[name]) for name, part in self.PARTS.items() if name in options}
        if head is not None:
            options["head"] = PrototypeHead(network.latent_dim, num_prototypes, **head)
        self.regularizer = build(network.latent_dim, num_prototypes, **options)

    @property
    def head(self) -> PrototypeHead:
        return self.regularizer.head

    def prepare(self, z: Tensor) -> None:
        """Nothing is fitted. The prior is that of the paper: sum_k N(v_k, std^2 I) / K."""

    def prior(self, n: int, generator: Generator) -> Tensor:
        return deepcopy(self.head).cpu().sample(n, std=self.head.std, generator=generator)


class Balanced(Prototypical):
    """Our method: the layer between encoder and decoder, with one optimizer and one backward pass.

    ``warmup`` has three values. "mmd" is an epoch of the MMD alone, and ``prototype_warmup_steps`` may set another
    length. "reconstruction" is the warm-up of all other methods. "none" is no warm-up. Batches of fewer than 2 K
    latents get a queue, as docs/training.md recommends. The last epoch has no ``noise``.
    """

    trained_as = "balanced"
    QUEUE = 1024

    def __init__(
        self,
        network: Network,
        plan: Plan,
        *,
        num_prototypes: int,
        preset: str = "ours",
        warmup: str = "mmd",
        queue_size: int | None = None,
        noise: float = 0.0,
        **options: Any,
    ) -> None:
        steps = {
            "mmd": {"prototype_warmup_steps": plan.steps_per_epoch},
            "reconstruction": {"warmup_steps": plan.warmup_epochs * plan.steps_per_epoch, "prototype_warmup_steps": 0},
            "none": {"prototype_warmup_steps": 0},
        }
        if warmup not in steps:
            raise ValueError(f"warmup: expected one of {sorted(steps)}, got {warmup!r}. Choose one.")
        if queue_size is None:
            queue_size = self.QUEUE if plan.batch_size < 2 * num_prototypes else 0
        if queue_size:
            options["queue"] = LatentQueue(queue_size, network.latent_dim)
        super().__init__(network, plan, num_prototypes=num_prototypes, preset=preset, **(steps[warmup] | options))
        self.noise = LatentNoise(noise, (plan.epochs - 1) * plan.steps_per_epoch)

    def loss(self, x: Tensor) -> Tensor:
        z, info = self.regularizer(self.network.encode(x))
        loss = reconstruction(self.network.decoder(self.noise(z)), x)
        return loss if self.regularizer.mode == "balanced" else loss + info.loss


class Algorithm1(Prototypical):
    """The paper's three optimizers, by :class:`proto_reg.PrototypicalTraining`. Its warm-up is the only one."""

    trained_as = "algorithm1"

    def __init__(self, network: Network, plan: Plan, *, preset: str = "paper", **options: Any) -> None:
        super().__init__(network, plan, preset=preset, prototype_warmup_steps=0, **options)
        training = PrototypicalTraining(
            nn.Sequential(network.features, network.latent),
            network.decoder,
            self.regularizer,
            reconstruction=reconstruction,
            warmup_epochs=plan.warmup_epochs,
            schedule="paper",
            optimizer=self.adam,
        )
        self.__dict__["training_loop"] = training  # no submodule, because its parts are registered already

    def add_optimizers(self) -> None:
        self.optimizers = self.training_loop.optimizers

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self.training_loop.epoch = epoch

    def step(self, x: Tensor) -> None:
        self.training_loop.step(x)
        if self.training_loop.skipped_steps:
            raise FloatingPointError("a gradient of Algorithm 1 is not finite")
