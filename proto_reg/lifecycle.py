"""What a layer keeps from one training step to the next: its step, what it saw, and where the prototypes are to go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._checks import check_number, check_positive_int
from ._distributed import Group, Ranks, whole
from ._warnings import LayerWatch
from .assigner import SinkhornAssigner
from .follower import PrototypeFollower
from .head import PrototypeHead
from .kernels.follow import followed
from .kernels.once import transforming
from .kernels.snapshot import snapshot
from .layout import Layout
from .mmd import AnchoredMMDLoss
from .output import RegularizerOutput
from .queue import LatentQueue
from .replay import Buffers, Replay
from .revival import revive
from .schedule import check_temperature, ramp, sharpness
from .tokens import Share
from .usage import UsageMeter


class Lifecycle(nn.Module):
    """The part of :class:`proto_reg.PrototypicalRegularizer` that lasts: components, schedules, counters.

    All of it that changes is in ``state_dict``. Arguments are those of the layer.
    """

    steps: Tensor
    layout: Layout
    prototype_weight: float
    mmd_weight: float
    mmd_warmup_weight: float
    mode: str

    def __init__(
        self,
        head: PrototypeHead,
        assigner: SinkhornAssigner,
        mmd: AnchoredMMDLoss,
        *,
        temperature: float | Sequence[float],
        temperature_steps: int,
        warmup_steps: int,
        prototype_warmup_steps: int,
        ramp_steps: int,
        noise: float,
        noise_steps: int,
        follow_rate: float,
        queue_size: int,
        group: Group,
    ) -> None:
        super().__init__()
        self.ranks = Ranks(group)
        self.head, self.assigner, self.mmd = head, assigner, mmd
        self.temperature_steps = check_positive_int("temperature_steps", temperature_steps, minimum=0)
        self.start_temperature, self.temperature = check_temperature(temperature, temperature_steps)
        self.warmup_steps = check_positive_int("warmup_steps", warmup_steps, minimum=0)
        self.prototype_warmup_steps = check_positive_int("prototype_warmup_steps", prototype_warmup_steps, minimum=0)
        self.ramp_steps = check_positive_int("ramp_steps", ramp_steps, minimum=0)
        self.noise = check_number("noise", noise, at_least=0)
        self.noise_steps = check_positive_int("noise_steps", noise_steps, minimum=0)
        check_positive_int("queue_size", queue_size, minimum=0)
        self.queue = LatentQueue(queue_size, head.latent_dim, group=group) if queue_size else None
        self.meter = UsageMeter(head.num_prototypes, group=group)
        self.follower = PrototypeFollower(head.prototypes, follow_rate, group=group)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.watch = LayerWatch()
        self.replay = Replay()

    def expect(self, total_steps: int | None) -> None:
        """Say how many training steps there will be, which frameworks know later; a warm-up as long is warned of."""
        if total_steps is not None:
            check_positive_int("total_steps", total_steps)
        self.watch.at_construction(
            epsilon=self.assigner.epsilon,
            temperature=self.temperature,
            latent_dim=self.head.latent_dim,
            warmup_steps=self.warmup_steps,
            prototype_warmup_steps=self.prototype_warmup_steps,
            ramp_steps=self.ramp_steps,
            total_steps=total_steps,
            weighted=self.mode == "weighted",
        )

    @property
    def usage(self) -> Tensor:
        """(K,) float32 share of the latents nearest to each prototype since the last reset; zeros if none."""
        return self.meter.usage

    def metrics(self) -> dict[str, float]:
        """What the layer saw in training since the last reset, over all ranks; one read from the device.

        Returns:
            A dict of floats, distances in units of the head's std, NaN where nothing was seen:

            * ``prototype_loss``, ``mmd_loss``: means over training forward passes.
            * ``perplexity``: exp of the entropy of :attr:`usage`, at most K; ``dead``: prototypes without a latent.
            * ``duplicates``: prototypes less than 2 from another; ``separation``: distance of the nearest two.
            * ``r2_per_dim``: mean |z - v|^2 / D; 1 under N(v, std^2 I).
            * ``active``: share of its full size that the prototype loss's weight has now: 0 in warm-up, 1 after the
              ramp.
        """
        return self.meter.metrics(whole(self.head.prototypes.detach()), self.head.std, active=self._ramp(self._begin()))

    def reset_metrics(self) -> None:
        """Start counting anew, for example with each epoch."""
        self.meter.reset_parameters()

    def reset_parameters(self) -> None:
        """Go back to step 0. Head, meter, follower and queue have a method of their own, as torch's modules do."""
        self.steps.zero_()
        self.watch.forget()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.watch.forget()

    @torch.no_grad()
    def revive(
        self,
        z: Tensor | None = None,
        *,
        optimizer: Optimizer | None = None,
        threshold: float | None = None,
        duplicates: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Put prototypes that hardly any latent is near to on latents far from the others, by k-means++.

        Call it between optimizer steps at the end of an epoch, but not of the first ten or so, in which prototypes find
        their latents by themselves; in a process group on all ranks, which take what rank 0 draws. The follower and
        ``optimizer`` forget those prototypes' past; the queue holds none. Counting starts anew: read :meth:`metrics`
        before.

        Args:
            z: latents in the layer's layout to choose from; those of the queue by default.
            optimizer: whose state of the revived prototypes, such as Adam's moments, is set to 0.
            threshold: share of the latents since the last reset below which a prototype is dead; .1 / K by default, a
                tenth of an equal share. In balanced training the smallest share settles between .13 / K (K = 100) and
                .87 / K (K = 10; digits, 30 epochs).
            duplicates: also revive prototypes less than 2 std from one with more latents.
            generator: of the draw.

        Returns:
            (n,) int64 indices of the revived prototypes.

        Raises:
            RuntimeError: nothing was counted since the last reset.
            ValueError, TypeError: no latents to choose from or too few, another optimizer; nothing has changed then.
        """
        if z is not None:
            latents, _ = self.layout.tokens(z, None, self.head.latent_dim)
        elif self.queue is not None:
            latents = self.queue.latents[self.queue.in_use]
        else:
            raise ValueError("z: expected latents to choose from, got None and no queue. Pass z, or queue_size > 0.")
        group = self.ranks.active()
        index = revive(self.head, self.usage, latents, optimizer, threshold, duplicates, generator, group)
        self.follower.forget(index, whole(self.head.prototypes))
        self.reset_metrics()
        return index

    def _changing(self) -> Buffers:
        """What a forward both depends on and changes."""
        queue = self.queue
        return [(self, "steps")] + ([] if queue is None else [(queue, name) for name in queue._buffers])

    def _move(self) -> None:
        """Prototypes follow the latents that were counted before."""
        head = self.head
        # FSDP1 leaves the head without a parameter, and what others compute here without autograd has no gradient.
        learns = head.prototypes.requires_grad or any(parameter.requires_grad for parameter in head.parameters())
        if self.follower.rate and learns:
            self.follower.move(head.to_write_to(), head.shards)

    @torch.no_grad()
    def _count(self, tokens: Tensor, keep: Tensor | None, output: RegularizerOutput) -> None:
        """Count a training forward of ``tokens`` (N, D)."""
        if self.prototype_weight:
            counted = followed(output.prototype_loss, self._active(), keep)
            self.follower.observe(tokens, output.assignments, self.head.prototypes.detach(), counted, self.head.std)
            self._adapt(output, counted, self._sharpness() if self.temperature_steps else None)
        losses = output.prototype_loss, output.mmd_loss
        self.meter.observe(tokens, output.scores, self.head.prototypes, losses, keep)
        if self.queue is not None:
            self.queue.push(tokens, keep)
        if torch.compiler.is_compiling():
            self.steps.copy_(snapshot(self.steps) + 1)  # raises where a checkpoint runs the graph again
        else:
            self.steps.add_(1)

    def _adapt(self, output: RegularizerOutput, counted: Tensor, sharpness: Tensor | None) -> None:
        """Adaptive marginals follow the scores of a training forward: the rows that are ``counted``, (N,) or ()."""
        if self.assigner.adaptive:
            scores = output.scores.detach() if sharpness is None else output.scores.detach() * sharpness
            self.assigner.observe(scores, self.temperature, counted)

    def _look(self, tokens: Tensor, keep: Tensor | None, share: Share, output: RegularizerOutput) -> None:
        """Have the watch look at a training forward of ``tokens`` (N, D)."""
        head, past = self.head, 0 if self.queue is None else self.queue.size
        begin = self._begin()
        if not self.watch.due(share.total + past, head.num_prototypes, begin) or not tokens.shape[0]:
            return
        # What FSDP2 gathered does not tell whether an optimizer has touched the shards; without weight none need.
        moving = head.shards is None and self.prototype_weight
        prototypes = head.prototypes if moving else head.prototypes.detach()
        options = head.std, self.temperature, self.mmd.kernel
        scores = output.scores * self._sharpness() if self.temperature_steps else output.scores
        found = scores / self.temperature, output.assignments, output.prototype_loss, self.steps - begin
        self.watch.look(tokens, keep, prototypes, *options, *found)

    def _now(self) -> Tensor:
        """() int64: the step count, also for the backward pass of this step, when it will have moved on."""
        return snapshot(self.steps) if self.training else self.steps

    def _begin(self) -> int:
        """The step at which the prototype loss sets in."""
        return self.warmup_steps + self.prototype_warmup_steps

    def _ramp(self, begin: int) -> Tensor:
        """() share of its full size at this step of a weight that sets in at ``begin``. It never leaves the device."""
        return ramp(self._now(), begin, self.ramp_steps)

    def _active(self, *, saved: bool = False) -> Tensor | None:
        """(2,) share of their usual size that the weights of prototype loss and MMD have: while prototypes warm up, the
        MMD's may be more than 1. () where it is the same of both, None where it is 1 for good.

        ``saved``: autograd saves it. Then it stays a tensor for good: torch's checkpointing runs a step again when it
        has been counted, and wants as many saved tensors as there were.
        """
        end = self._begin() + self.ramp_steps
        if not end:
            return None
        if self._past(end):
            return self.steps.new_ones(2 if self.prototype_warmup_steps else (), dtype=torch.float32) if saved else None
        if not self.prototype_warmup_steps:
            return self._ramp(self.warmup_steps)
        alone = self.mmd_warmup_weight / self.mmd_weight if self.mmd_weight else 0.0
        pull = self._ramp(self.warmup_steps)
        return torch.stack([self._ramp(self._begin()), torch.where(self._now() < self._begin(), alone * pull, pull)])

    def _noise(self) -> Tensor | float:
        """Size of the noise at this step: none in warm-up, then more, up to all of it; none after ``noise_steps``."""
        if not (self.warmup_steps or self.ramp_steps or self.noise_steps):
            return self.noise
        size = self.noise * self._ramp(self.warmup_steps)
        return torch.where(self._now() < self.noise_steps, size, 0.0) if self.noise_steps else size

    def _past(self, step: int) -> bool:
        """Whether ``step`` has come, as far as is known without waiting: a schedule's dozen operators cost time."""
        steps = self.steps
        if torch.compiler.is_compiling() or transforming() or type(steps) is not Tensor:
            return False  # in a graph, or of no value, as fake tensors are
        if steps.is_cpu:
            return steps.item() >= step
        return self.watch.active_steps + self._begin() >= step  # of a look at what a GPU had done by then

    def _sharpness(self) -> Tensor:
        """() what scores are multiplied with at this step to be at its temperature under the final one."""
        return sharpness(self._now(), self.start_temperature, self.temperature, self._begin(), self.temperature_steps)
