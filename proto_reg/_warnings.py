"""Warnings about quiet mistakes: each is said once, with its cure. The host never waits for the device."""

from __future__ import annotations

import math
import os
import weakref
from typing import cast

import torch
from torch import Tensor

from . import kernels
from ._checks import warn
from ._distributed import is_sharded
from ._wiring import MANY, Wiring, parameters_behind
from .batch import BatchShard
from .functional.metrics import SEPARATION
from .output import RegularizerOutput
from .schedule import Schedule

FIRST_LOOK = 50  # training steps before the first look at the latents; the next look is at twice as many
SETTLED = 400  # after so many training steps a loss of ln K, or close prototypes, are no longer a start
# An r^2/D that is so many times too small or too large does not mend: after SETTLED steps, after four times as many.
# On Fashion-MNIST .14 at SETTLED steps came to 1 later; .06 to .10 did not.
FAR, FAR_LATER = 8.0, 2.0
GUESSING = 0.9  # share of ln K: predictions with a larger entropy are guesses


_hinted = False  # whether this process was told that kernels can be compiled


class LayerWatch:
    """Watches one layer: its options and shapes at once, its latents at a few steps."""

    def __init__(self) -> None:
        self.said: set[str] = set()
        self.weighted = False
        self.std, self.kernel = 1.0, ""
        self._small = 0  # steps with fewer latents than prototypes, less the steps with enough
        self.looks = 0
        self._last: Tensor | None = None  # the prototypes at the last look
        self._behind: tuple[weakref.ref, Tensor] | None = None  # a parameter of the encoder, and what it was then
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None
        self.active_steps = -math.inf  # after the warm-up, at the last look that has arrived
        self.steps: int | None = None  # what the host knows of the layer's count
        self.follows = False  # whether the std follows the scale of the latents
        self.wiring = Wiring(self.said)

    def __getstate__(self) -> dict:
        gone = {"wiring": None, "_last": None, "_behind": None, "_pending": None}
        return self.__dict__ | {"said": set(self.said)} | gone

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.wiring = Wiring(self.said)

    def forget(self) -> None:
        """Forget the step: the layer's count was changed."""
        self._pending, self.active_steps, self.steps = None, -math.inf, None

    def count(self, steps: Tensor) -> int:
        """The value of ``steps`` (). Call it once for each training step: it waits for a GPU only the first time."""
        self.steps = int(steps) if steps.is_cpu or self.steps is None else self.steps + 1
        return self.steps

    def say(self, key: str, message: str) -> None:
        """Warn with ``message`` unless this watch already spoke of ``key``."""
        if key not in self.said:
            self.said.add(key)
            warn(message)

    def look_at_options(self, schedule: Schedule, epsilon: float, latent_dim: int, mode: str) -> None:
        """Look at a layer that is built."""
        self.weighted = mode == "weighted"
        temperature = schedule.final_temperature
        if epsilon == temperature:
            self.say(
                "epsilon",
                f"epsilon = temperature = {temperature:g}: with balanced codes the prototype loss has no gradient. "
                "Make epsilon smaller, for example temperature / 2.",
            )
        if latent_dim >= 2048:
            self.say(
                "dimension",
                f"latent_dim = {latent_dim}: a batch says next to nothing about a normal distribution in thousands "
                "of dimensions. Regularise positions (layout='b d h w') or put a linear bottleneck before the layer.",
            )

    def look_at_length(self, schedule: Schedule, total_steps: int) -> None:
        """Look at a schedule and at the length of the training."""
        if schedule.warmup_steps >= total_steps:
            self.say(
                "warmup",
                f"warmup_steps = {schedule.warmup_steps} covers all {total_steps} steps of the training: nothing will "
                "be regularised. Shorten the warm-up.",
            )
        elif schedule.end >= total_steps:
            names = ("warmup_steps", "mmd_steps", "ramp_steps")
            parts = [name for name in names if getattr(schedule, name)]
            self.say(
                "warmup",
                f"{' + '.join(parts)} = {schedule.end} covers all {total_steps} steps of the training: the weights "
                "never reach their full size. Shorten them.",
            )

    def look_at_standstill(self) -> None:
        """Look at a training step that is not counted while the schedule is not over."""
        if self.looks == 0 and not torch.compiler.is_compiling():
            self.say(
                "tracking",
                "tracking = False: the layer counts no steps, so its schedule stays where it is, and the weights never "
                "reach their full size. Build the layer with schedule=Schedule(mmd_steps=0).",
            )

    def due(self, total: int, num_prototypes: int, begin: int) -> bool:
        """Look at the shapes of a training step with ``total`` latents. Returns whether it is time to look at values.

        It is time after 50, 100, 200, ... steps, in a warm-up of ``begin`` steps and again after it.
        """
        if torch.compiler.is_compiling():
            return False
        self._small = max(self._small + (1 if total < num_prototypes else -1), -FIRST_LOOK)
        if self._small > 1:  # the last batch of an epoch may be smaller than the others
            self.say(
                "batch",
                f"{total} latents for {num_prototypes} prototypes in a training step: most prototypes get one "
                "or none, and the MMD needs two. Use larger batches, fewer prototypes or queue=LatentQueue(size, "
                "latent_dim).",
            )
        if self._pending is not None:
            self._read()
        self.looks += 1
        steps = self.looks if self.looks <= begin else self.looks - begin
        return steps % FIRST_LOOK == 0 and (steps // FIRST_LOOK).bit_count() == 1

    def look(
        self,
        batch: BatchShard,
        output: RegularizerOutput,
        prototypes: Tensor,
        std: float,
        temperature: Tensor,
        kernel: str,
        active_steps: Tensor,
        follows: bool = False,
    ) -> None:
        """Look at a training step on ``batch``, at ``temperature`` (), ``active_steps`` () after the warm-up.

        ``std`` is the deviation of the distribution around each of ``prototypes`` (K, D), ``kernel`` the MMD's.
        ``follows``: the std will follow the scale of the latents.
        """
        tokens = batch.tokens
        if not tokens.requires_grad:
            self.say(
                "detached",
                "The latents carry no gradient: the encoder learns nothing from the layer. Pass them without "
                "detach(), unless the encoder is to stay as it is.",
            )
        self.std, self.kernel, self.follows = std, kernel, follows
        figures = output.scores.detach() / temperature, output.assignments, output.prototype_loss.detach()
        idle = self._no_optimizer_steps(tokens)
        self._measure(tokens.detach(), batch.mask, prototypes, *figures, temperature, active_steps, idle)

    def hint(self, device: torch.device) -> None:
        """Say once in a process that compiled kernels would help, if they can be built here."""
        global _hinted
        if _hinted or device.type != "cpu":
            return
        _hinted = True
        chosen = kernels.backends.choose("auto", torch.empty(0, dtype=torch.float32, device=device))
        if chosen == "torch" and "PROTO_REG_BACKEND" not in os.environ and kernels.build.obstacle("cpu") is None:
            self.say(
                "kernels",
                "Compiled kernels would make Sinkhorn about five times as fast on this CPU, and a compiler is there. "
                "Run once: python -m proto_reg build cpu.",
            )

    def explain(self, metrics: dict[str, float]) -> None:
        """Say why ``metrics`` are NaN."""
        if math.isnan(metrics["perplexity"]):
            self.say(
                "nothing",
                "metrics: no latent was counted since the last reset, so most figures are NaN. Read them after "
                "training steps: the layer counts in training mode, with gradients enabled, while tracking is True.",
            )
        elif math.isnan(metrics["prototype_loss"] + metrics["mmd_loss"]):
            self.say(
                "metrics",
                "metrics: a loss is NaN because a training step since the last reset had NaN or infinity in its "
                "latents. Look for the overflow upstream, or use assigner=SinkhornAssigner(nan_policy='isolate').",
            )

    def _no_optimizer_steps(self, tokens: Tensor) -> Tensor | None:
        """() bool: whether the encoder is unchanged since the last look, as in accumulation; None if nobody knows."""
        parameter, before = next(iter(parameters_behind(tokens)[0]), None), self._behind
        self._behind = None
        # FSDP frees the memory of parameters that it has sharded again.
        if parameter is None or is_sharded(parameter) or not parameter.untyped_storage().size():
            return None
        shown = parameter.detach().flatten()[:MANY]
        self._behind = weakref.ref(parameter), shown.clone()
        known = before is not None and before[0]() is parameter and before[1].device == shown.device
        return torch.eq(cast(tuple, before)[1], shown).all() if known else None

    def _measure(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        prototypes: Tensor,
        logits: Tensor,
        assignments: Tensor,
        prototype_loss: Tensor,
        temperature: Tensor,
        active_steps: Tensor,
        idle: Tensor | None,
    ) -> None:
        """Queue the figures to look at. On a GPU they arrive while it goes on working."""
        learns, prototypes = prototypes.requires_grad, prototypes.detach()
        several, shown = len(prototypes) > 1, prototypes[:MANY]
        last, self._last = self._last, shown.clone()
        known = learns and several and last is not None and last.device == shown.device
        untouched = torch.eq(cast(Tensor, last), shown).all() if known else shown.new_zeros((), dtype=torch.bool)
        untouched = untouched if idle is None else untouched & ~idle
        mask = torch.ones_like(assignments, dtype=torch.bool) if mask is None else mask
        lowest = torch.where(mask, tokens.amin(1), torch.inf)
        radius = torch.where(mask, ((tokens - prototypes[assignments]) / self.std).square().mean(1), 0.0)
        entropy = torch.where(mask, torch.special.entr(logits.float().softmax(1)).sum(1), 0.0)
        unit = math.log(max(2, len(prototypes)))
        figures = torch.stack(
            [
                prototype_loss / unit,
                entropy.sum() / mask.sum() / unit,
                lowest.amin(),
                radius.sum() / mask.sum(),  # NaN if no latent counts; then no warning follows
                torch.pdist(shown.float() / self.std).amin() if several else prototypes.new_full((), torch.inf),
                active_steps,
                temperature,
                untouched,
                (shown.isfinite().all() & tokens.isfinite().all()).logical_not(),
            ]
        ).float()
        if figures.device.type != "cuda":
            self._pending = figures.cpu(), None
            self._read()
            return
        host = torch.empty(figures.shape, dtype=figures.dtype, device="cpu", pin_memory=True)
        host.copy_(figures, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = host, event

    def _read(self) -> None:
        """Judge the pending figures if they have arrived."""
        figures, event = cast(tuple, self._pending)
        if event is not None and not event.query():
            return
        self._pending = None
        self._judge(*figures.tolist())

    def _judge(
        self,
        loss: float,
        entropy: float,
        lowest: float,
        radius: float,
        separation: float,
        active_steps: float,
        temperature: float,
        untouched: float,
        broken: float,
    ) -> None:
        """Warn by the figures of :meth:`_measure`, which come in their order."""
        self.active_steps = active_steps
        if broken:
            self.say(
                "finite",
                "NaN or infinity in the latents or the prototypes: one such latent makes the gradient of a whole batch "
                "NaN. Skip those steps, or let the layer leave such latents out: "
                "assigner=SinkhornAssigner(nan_policy='isolate').",
            )
        if untouched and active_steps > FIRST_LOOK:
            weighted = "Add info.loss to your loss (mode='weighted'), and give" if self.weighted else "Give"
            self.say(
                "optimizer",
                f"No optimizer has touched the prototypes in {FIRST_LOOK} training steps or more. {weighted} it the "
                "layer's parameters, for example optimizer.add_param_group({'params': layer.parameters()}), and decode "
                "the z that the layer returns: its gradient comes back through it.",
            )
        if active_steps >= SETTLED and loss > 0.98:
            found = f"The prototype loss is still {loss:.2f} ln K after {active_steps:.0f} steps"
            if entropy > GUESSING:
                self.say(
                    "loss",
                    f"{found}: latents know their prototypes no better than by chance. Lower the temperature, start "
                    "from data (head.init_from) or use fewer prototypes.",
                )
            else:
                higher = f"{2 * loss * temperature:.2g}"
                self.say(
                    "sure",
                    f"{found}: latents are surer of their prototypes than they are right; a guess would cost as much. "
                    f"Raise the temperature, for example to {higher}, and the assigner's epsilon to half of it.",
                )
        if 0 <= lowest < math.inf:
            self.say(
                "sign",
                "All latents are >= 0: no normal distribution around a prototype looks like that. Let the encoder end "
                "in a linear layer, without ReLU.",
            )
        self._judge_distances(radius, separation, active_steps)

    def _judge_distances(self, radius: float, separation: float, active_steps: float) -> None:
        """Warn with the std that fits, if r^2/D is far from 1 or prototypes are too close."""
        if self.follows:  # only what is wrong when the std has followed
            if active_steps >= 4 * SETTLED and separation < SEPARATION:
                self.say("separation", self._close(separation, "Use fewer prototypes"))
            return
        factor = max(radius, 1e-6) ** 0.5
        std = f"std={self.std * factor:.2g}"
        gaussian = self.kernel == "gaussian"
        if gaussian and 50 < radius < math.inf:
            self.say(
                "radius",
                f"{self._measured(radius, active_steps)}: the Gaussian kernel has next to no gradient there. Aim "
                f"at wider distributions: build the layer with {std}. Or use AnchoredMMDLoss('energy').",
            )
        if active_steps < SETTLED:
            return
        far = FAR if active_steps < 4 * SETTLED else FAR_LATER
        if radius < 1 / far:
            self.say(
                f"narrow at {self.std}",
                f"{self._measured(radius, active_steps)}: samples around prototypes would be noise to the decoder. "
                f"Aim at narrower distributions, which costs nothing: build the layer with {std}.",
            )
        elif far < radius < (50 if gaussian else math.inf):
            self.say(
                f"wide at {self.std}",
                f"{self._measured(radius, active_steps)}: samples around prototypes would be less varied than the "
                f"latents are. Aim at wider distributions: build the layer with {std}.",
            )
        elif separation < SEPARATION:
            cure = f"Build the layer with {std}, or use" if separation / factor > SEPARATION else "Use"
            self.say("separation", self._close(separation, f"{cure} fewer prototypes"))

    @staticmethod
    def _close(separation: float, cure: str) -> str:
        return f"Two prototypes are {separation:.2f} std apart, inside each other's noise. {cure}."

    def _measured(self, radius: float, steps: float) -> str:
        target = "N(v, I)" if self.std == 1 else f"N(v, {self.std:g}^2 I)"
        return (
            "Mean r^2/D, the squared distance of latents from their prototypes per dimension and std^2, is "
            f"{radius:.2g} after {steps:.0f} steps, where {target} has 1"
        )
