"""The three components composed into one layer that goes between an encoder and a decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from ._checks import check_choice, check_instance, check_number, check_positive_int, compute_dtype
from ._distributed import Group, Ranks, one_process, whole
from ._warnings import LayerWatch
from .assigner import SinkhornAssigner
from .balance import AttachDirection, is_of_leaf
from .batch import BatchShard, Gatherer
from .follower import PrototypeFollower
from .functional.sinkhorn_arguments import check_marginals, usable
from .fused import fused_pull
from .head import PrototypeHead
from .kernels.first_order import transforming, with_slopes
from .kernels.layer_ops import loss_of_shares
from .kernels.snapshot import snapshot
from .layout import Layout
from .mmd import AnchoredMMDLoss
from .output import RegularizerOutput
from .pull import Gradients, Pull, loss_gradients, pull
from .queue import LatentQueue
from .record import Records, follow, record
from .replay import Buffers, Replay
from .revival import revive
from .scale import due, follow_scale
from .schedule import NEVER, Schedule, StepFactors
from .usage import UsageMeter

MODES = ("balanced", "weighted")
# Every process computes the whole batch if latents and scores of all have at most so many entries (4 MiB).
GATHERED = 1 << 20


class PrototypicalRegularizer(nn.Module):
    """Organises the latent space of any autoencoder around prototypes: ``z, info = regularizer(encoder(x))``.

    ``mode="balanced"`` returns z unchanged and acts in the backward pass. To a gradient g that arrives it adds
    ``prototype_weight |g|/|g_p| g_p + mmd_weight |g|/|g_r| g_r``. Here g_p and g_r are the gradients of the two losses
    at the latents; norms are over the batch. The prototypes get ``prototype_weight |g|/|g_p|`` times their gradient.
    So no loss is added, and no weight depends on the size of the reconstruction loss.
    ``mode="weighted"`` leaves gradients alone: add ``info.loss`` to your own. Under ``no_grad``, in eval mode and
    during warm-up the layer is the identity in both passes.

    In balanced mode call ``backward`` once for each forward, on the sum of your losses. Two backward passes through one
    forward are scaled by |g_a| + |g_b|, which is more than the |g_a + g_b| of their sum. If you need two,
    ``mode="weighted"`` gives the same gradient either way.

    Args:
        latent_dim: D.
        num_prototypes: K.
        std: standard deviation of the normal distribution around each prototype that training aims at, in the units of
            the latents. None begins with 1 and follows the scale of the latents; a number stays, and the layer warns
            if latents lie too close together for it. If a head is given, the head's.
        head, assigner, mmd: components to use instead of the default ones. They keep their own options and groups.
        prototype_weight, mmd_weight: lambda_p and lambda_r, >= 0: the size of each regularising gradient relative to
            the reconstruction's (balanced) or the factor of each loss (weighted).
        mode: ``"balanced"`` or ``"weighted"``.
        schedule: when the losses set in, and at which temperature; ``Schedule()`` by default.
        layout: einops pattern of the latents with the axis ``d``; every other position is a latent of its own:
            ``"b d"``, ``"b n d"``, ``"b d h w"``, ``"b d t h w"``.
        follow_rate: in [0, 1). With each optimizer step prototypes also go this share of the way to the most typical of
            their latents. 0 leaves them to the optimizer.
        queue: past latents that are balanced together with those of the batch. The losses are those of the batch alone.
        group: the processes whose latents are one batch in training mode: ``"default"`` (the default process group, if
            there is one), None (this process alone) or a ProcessGroup. All must call the layer, and run its backward
            pass, equally often; a process without latents passes an empty batch.

    Attributes:
        tracking: bool, True. The layer counts steps, usage and losses, moves prototypes and fills the queue. With False
            a training forward changes nothing in the layer, and ``torch.func`` can differentiate ``mode="weighted"``.
        steps: () int64, training forward passes so far.

    Raises:
        TypeError, ValueError: an argument out of its range, named, or components that do not fit together.
    """

    steps: Tensor

    def __init__(
        self,
        latent_dim: int,
        num_prototypes: int,
        *,
        std: float | None = None,
        head: PrototypeHead | None = None,
        assigner: SinkhornAssigner | None = None,
        mmd: AnchoredMMDLoss | None = None,
        prototype_weight: float = 0.03,
        mmd_weight: float = 0.1,
        mode: str = "balanced",
        schedule: Schedule | None = None,
        layout: str = "b d",
        follow_rate: float = 0.02,
        queue: LatentQueue | None = None,
        group: Group = "default",
    ) -> None:
        super().__init__()
        self.ranks = Ranks(group)
        self.prototype_weight = check_number("prototype_weight", prototype_weight, at_least=0)
        self.mmd_weight = check_number("mmd_weight", mmd_weight, at_least=0)
        self.mode = check_choice("mode", mode, MODES)
        self.layout = Layout(layout)
        schedule = Schedule() if schedule is None else check_instance("schedule", schedule, Schedule)
        self.schedule = schedule if self.mmd_weight else replace(schedule, mmd_steps=0)
        self.head = PrototypeHead(latent_dim, num_prototypes, std=std) if head is None else head
        self.assigner = SinkhornAssigner(group=group) if assigner is None else assigner
        self.mmd = AnchoredMMDLoss(group=group) if mmd is None else mmd
        self.queue = queue
        self._check_components(latent_dim, num_prototypes, std)
        self.meter = UsageMeter(num_prototypes, group=group)
        self.follower = PrototypeFollower(self.head.prototypes, follow_rate, group=group)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.tracking = True
        self.gatherer, self.replay, self.watch = Gatherer(), Replay(), LayerWatch()
        self.watch.look_at_options(self.schedule, self.assigner.epsilon, latent_dim, self.mode)

    def _check_components(self, latent_dim: int, num_prototypes: int, std: float | None) -> None:
        """TypeError or ValueError for components that are not ours or do not fit together."""
        head, marginals, queue = self.head, getattr(self.assigner, "marginals", None), self.queue
        check_instance("head", head, PrototypeHead)
        check_instance("assigner", self.assigner, SinkhornAssigner)
        check_instance("mmd", self.mmd, AnchoredMMDLoss)
        if (head.latent_dim, head.num_prototypes) != (latent_dim, num_prototypes):
            raise ValueError(
                f"head: expected latent_dim={latent_dim} and num_prototypes={num_prototypes}, got "
                f"{head.latent_dim} and {head.num_prototypes}. Build both with the same sizes."
            )
        if std is not None and check_number("std", std, above=0) != head.std:
            raise ValueError(f"head: expected std={std}, got {head.std}. Give it to one of the two.")
        if marginals is not None:
            check_marginals(marginals, num_prototypes)
        if queue is not None and check_instance("queue", queue, LatentQueue).latent_dim != latent_dim:
            raise ValueError(
                f"queue: expected latent_dim={latent_dim}, got {queue.latent_dim}. Build it as "
                f"LatentQueue({queue.size}, {latent_dim})."
            )

    if TYPE_CHECKING:

        def __call__(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, RegularizerOutput]: ...

    def forward(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, RegularizerOutput]:
        """Regularise latents ``z``, shaped as ``layout`` says; ``mask``, z's shape without d, is True where they count.

        Returns:
            z: itself. In balanced training another tensor in the same memory, or a copy of a leaf that requires a
                gradient.
            info: losses of the batch of all processes of the group; scores, codes and assignments of this process.

        Raises:
            TypeError, ValueError: latents or mask of another rank, size or dtype, or an empty batch.
        """
        learning = self.training and torch.is_grad_enabled()
        counting = learning and self.tracking
        return self.replay.run(self._forward, self._changing if counting else None, counting, z, mask, learning)

    def _forward(
        self, counting: bool, z: Tensor, mask: Tensor | None, learning: bool
    ) -> tuple[Tensor, RegularizerOutput]:
        """:meth:`forward`; ``learning``: gradients are wanted; ``counting``: the state changes."""
        balanced, factors = learning and self.mode == "balanced", self._factors()
        self._check_wiring(factors, learning, counting)
        batch = self._batch(z, mask, gather=balanced)
        if balanced:
            pulled = self._pull(batch, factors, counting)
            z, output = self._attached(z, batch, pulled), pulled.output
        else:
            if counting:
                follow(self.head, self.follower)
            with torch.set_grad_enabled(learning):
                output = self._losses(batch, factors, counting)
        if counting:
            self._look(batch, output)
            self._follow_scale(batch, output)
        return z, self._restored(self._watched(batch, z, output, counting), z)

    def losses(self, z: Tensor, mask: Tensor | None = None, *, count: bool = False) -> RegularizerOutput:
        """Both losses of ``z``, differentiable in either mode: what Algorithm 1 steps on.

        ``count``: count the call as a training forward, with ``tracking``; prototypes stay where they are.
        """
        return self.replay.run(
            self._counted_losses, self._changing if self.tracking else None, count and self.tracking, z, mask
        )

    def _counted_losses(self, counting: bool, z: Tensor, mask: Tensor | None) -> RegularizerOutput:
        batch = self._batch(z, mask)
        output = self._losses(batch, self._factors(), counting)
        if counting:
            self._look(batch, output)
        return self._restored(output, z)

    def _batch(self, z: Tensor, mask: Tensor | None, *, gather: bool = False) -> BatchShard:
        """Latents as rows (N, D) in the dtype of the computation. ``gather``: of all processes, if they are few."""
        group, head, nan_policy = self.ranks.active(self.training), self.head, self.assigner.nan_policy
        tokens, mask = self.layout.tokens(z, mask, head.latent_dim, empty=group is not None)
        own = head.prototypes.dtype
        if not z.dtype == own == torch.float32:  # the common case is not to pay for the others
            tokens = tokens.to(compute_dtype(torch.promote_types(z.dtype, own)))
        if nan_policy != "propagate":
            mask = usable(tokens, mask, nan_policy, group)
        if mask is not None:
            # A position that is left out may hold anything, NaN too. It must reach nothing.
            tokens = torch.where(mask[:, None], tokens, 0.0)
        if group is None:
            return BatchShard.undivided(tokens, mask)
        shard = self.gatherer.shard(tokens.detach(), mask, group, self._gather_limit() if gather else 0)
        return shard._replace(tokens=tokens)

    def _pull(self, batch: BatchShard, factors: StepFactors, counting: bool) -> Pull:
        """Prototypes follow; both losses pull; the step is recorded."""
        if batch.whole is not None:
            return self._pull_together(batch, batch.whole, factors, counting)
        if batch.group is None and self._same_group():
            components, records = (self.head, self.assigner, self.mmd), self._records() if counting else None
            options = self.schedule.final_temperature, self.prototype_weight, self.mmd_weight
            pulled = None if self.queue is not None else fused_pull(batch, *components, records, factors, *options)
            if pulled is not None:
                return pulled
        with torch.no_grad(), torch.autocast(batch.tokens.device.type, enabled=False):
            if counting:
                follow(self.head, self.follower)
            gradients, parameters = self._gradients(batch, factors), list(self.head.parameters())
            pulled = pull(gradients, parameters, batch, factors, self.prototype_weight, self.mmd_weight)
            if counting:
                self._record(batch, pulled.output, factors)
        return pulled

    def _pull_together(self, batch: BatchShard, everything: BatchShard, factors: StepFactors, counting: bool) -> Pull:
        """:meth:`_pull` of the rows of all processes, which each process computes for itself."""
        # A GPU adds in any order, so prototypes would drift apart: there each process records its own rows.
        record_all = counting and batch.tokens.is_cpu
        if counting and not record_all:
            follow(self.head, self.follower)
        with one_process():
            direction, steps, output = self._pull(everything, factors, record_all)
        own = slice(batch.start, batch.start + batch.tokens.shape[0])
        rows = {name: getattr(output, name)[own].clone() for name in ("scores", "codes", "assignments")}
        # Each process has the whole step, and |g| of a mean over its own rows is too large by their number.
        steps = [(parameter, step / len(batch.counts)) for parameter, step in steps]
        pulled = Pull(direction[own], steps, output._replace(**rows))
        if counting and not record_all:
            self._record(batch, pulled.output, factors)
        return pulled

    def _attached(self, z: Tensor, batch: BatchShard, pulled: Pull) -> Tensor:
        """``z``, whose gradient brings the pull along in the backward pass."""
        if not pulled.steps:  # FSDP1 has taken the parameters away: a gradient would reach none
            self.head.to_write_to()
        mask = None if batch.mask is None else self.layout.restore(batch.mask[:, None], z)
        direction = self.layout.restore(pulled.direction, z) if self.prototype_weight or self.mmd_weight else None
        if is_of_leaf(z):
            z = z.clone()  # a write to the returned tensor must not change a parameter
        parameters, steps = zip(*pulled.steps, strict=True)
        return AttachDirection.apply(batch.group, z, direction, mask, *steps, *parameters)

    def _losses(self, batch: BatchShard, factors: StepFactors, counting: bool) -> RegularizerOutput:
        """Both losses, with their derivatives if gradients are enabled; the step is recorded."""
        with torch.autocast(batch.tokens.device.type, enabled=False):
            output = self._with_derivatives(batch, self._gradients(batch, factors), factors)
        if counting:
            self._record(batch, output, factors)
        return output

    def _gradients(self, batch: BatchShard, factors: StepFactors) -> Gradients:
        """Both losses and their gradients; no graph is built."""
        components = self.head, self.assigner, self.mmd, self.queue
        at = factors.sharpness, self.schedule.final_temperature, self._now, self.training
        with torch.no_grad():
            return loss_gradients(batch._replace(tokens=batch.tokens.detach()), *components, *at)

    def _with_derivatives(self, batch: BatchShard, gradients: Gradients, factors: StepFactors) -> RegularizerOutput:
        """The losses, whose derivatives are ``gradients``."""
        output, by_tokens, by_parameters, by_latents = gradients
        prototype_loss, mmd_loss, shares = output.prototype_loss, output.mmd_loss, factors.shares
        if torch.is_grad_enabled():
            inputs = [batch.tokens, *self.head.parameters()]
            prototype_loss = with_slopes("the prototype loss", prototype_loss, inputs, [by_tokens, *by_parameters])
            mmd_loss = with_slopes("the MMD", mmd_loss, [batch.tokens], [by_latents])
        if shares is None and self.schedule.end:
            # A checkpoint wants as many saved tensors in its second run, after the schedule's end, as in its first.
            shares = self.steps.new_ones(2, dtype=torch.float32)
        loss = loss_of_shares(self.prototype_weight * prototype_loss, self.mmd_weight * mmd_loss, shares)
        return output._replace(loss=loss, prototype_loss=prototype_loss, mmd_loss=mmd_loss)

    def _record(self, batch: BatchShard, output: RegularizerOutput, factors: StepFactors) -> None:
        """Count a training step, and remember its latents."""
        components, options = (self.head, self.assigner), (self.schedule.final_temperature, self.prototype_weight)
        record(batch, output, factors, *components, self._records(), *options)

    def _records(self) -> Records:
        return Records(self.follower, self.meter, self.queue, self.steps)

    def _look(self, batch: BatchShard, output: RegularizerOutput) -> None:
        """The watch looks at a training step."""
        head, queue, begin = self.head, self.queue, self.schedule.begin
        past = 0 if queue is None else queue.size
        if not self.watch.due(batch.total + past, head.num_prototypes, begin) or not batch.tokens.shape[0]:
            return
        if self.assigner.backend == "auto":
            self.watch.hint(batch.tokens.device)
        # Prototypes that FSDP2 gathered do not tell whether an optimizer has touched the shards.
        moving = head.shards is None and self.prototype_weight
        prototypes = head.prototypes if moving else head.prototypes.detach()
        temperature = self.schedule.temperature_at(self.steps)
        at, kernel = self.steps - begin, self.mmd.options.kernel
        self.watch.look(batch, output, prototypes, head.std, temperature, kernel, at, head.follows_scale)

    def _watched(self, batch: BatchShard, z: Tensor, output: RegularizerOutput, counting: bool) -> RegularizerOutput:
        """``output`` of one of the first calls, by which a mistake in the wiring is noticed."""
        wiring, training = self.watch.wiring, self.training
        if not wiring.open or torch.compiler.is_compiling() or transforming() or type(self.steps) is not Tensor:
            return output
        if not training:
            wiring.watch_evaluation(z, lambda: bool(self.steps))
        if not counting:
            return output
        return output._replace(loss=wiring.watch(batch.tokens, z, output.loss, self.head, self.mode == "balanced"))

    def _follow_scale(self, batch: BatchShard, output: RegularizerOutput) -> None:
        """Every few hundred steps a std that was not given goes to that of the latents."""
        real = type(self.steps) is Tensor and not torch.compiler.is_compiling()
        if self.head.follows_scale and real:
            step = self.watch.count(self.steps) - self.schedule.begin
            if due(step):
                follow_scale(self.head, batch, output.assignments, step)

    def _restored(self, output: RegularizerOutput, z: Tensor) -> RegularizerOutput:
        """``output`` in the layout of ``z``."""
        if self.layout.is_rows:
            return output
        return output._replace(
            scores=self.layout.restore(output.scores, z),
            codes=self.layout.restore(output.codes, z),
            assignments=self.layout.restore_positions(output.assignments, z),
        )

    def _factors(self) -> StepFactors:
        """What the schedule says of this step."""
        return self.schedule.at(self._now, self._reached(), self.mmd_weight)

    def _now(self) -> Tensor:
        """() int64: the step count, also for this step's backward pass, when the count has moved on."""
        return snapshot(self.steps) if self.training else self.steps

    def _reached(self) -> float:
        """A step that training has reached, as far as the host knows without waiting for the device."""
        steps = self.steps
        if torch.compiler.is_compiling() or transforming() or type(steps) is not Tensor:
            return NEVER  # in a graph, or a fake tensor, which has no value
        if steps.is_cpu:
            return steps.item()
        return self.watch.active_steps + self.schedule.begin  # when a GPU had done the last look

    def _changing(self) -> Buffers:
        """What a forward both depends on and changes."""
        queue = self.queue
        return [(self, "steps")] + ([] if queue is None else [(queue, name) for name in queue._buffers])

    def _same_group(self) -> bool:
        """Whether the components work with the processes that the layer works with."""
        return self.assigner.ranks.group == self.mmd.ranks.group == self.ranks.group

    def _gather_limit(self) -> int:
        """Rows of all processes up to which each computes the whole batch: one exchange instead of one for each sum."""
        apart = not self._same_group() or self.mmd.options.target != "analytic" or self.queue is not None
        return 0 if apart else GATHERED // (self.head.latent_dim + self.head.num_prototypes)

    def _check_wiring(self, factors: StepFactors, learning: bool, counting: bool) -> None:
        """RuntimeError under a ``torch.func`` transform that this layer, as it is set, cannot go through.

        A warning where the schedule stands still.
        """
        if transforming() and (counting or (self.training and self.mode == "balanced")):
            raise RuntimeError(
                f"torch.func: expected a layer with mode='weighted' and tracking=False, got mode={self.mode!r} and "
                f"tracking={self.tracking}. A pure function keeps no count and acts on no other gradient; layer.losses "
                "does neither."
            )
        if learning and not self.tracking and factors.shares is not None:
            self.watch.look_at_standstill()

    def expect(self, total_steps: int) -> None:
        """Say how many training steps there will be. A warning tells if the schedule is as long."""
        check_positive_int("total_steps", total_steps)
        self.watch.look_at_length(self.schedule, total_steps)

    @property
    def usage(self) -> Tensor:
        """(K,) float32 share of the latents nearest to each prototype since the last reset; zeros if none."""
        return self.meter.usage

    def metrics(self) -> dict[str, float]:
        """What the layer saw in training since the last reset, over all processes; one read from the device.

        Returns:
            A dict of floats, distances in units of the head's std, NaN where nothing was seen:

            * ``prototype_loss``, ``mmd_loss``: means over training forward passes.
            * ``perplexity``: exp of the entropy of :attr:`usage`, at most K; ``dead``: prototypes without a latent.
            * ``duplicates``: prototypes less than 2 from another; ``separation``: distance of the nearest two.
            * ``r2_per_dim``: mean |z - v|^2 / D; 1 under N(v, std^2 I).
            * ``active``: share of its full size that the prototype loss's weight has now: 0 in warm-up, 1 after the
              ramp.
        """
        active = self.schedule.loss_shares(self._now(), self.mmd_weight)[0]
        figures = self.meter.metrics(whole(self.head.prototypes.detach()), self.head.std, active=active)
        self.watch.explain(figures)
        return figures

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
        """Put prototypes with hardly any latents on latents far from the other prototypes, by k-means++.

        Call it between optimizer steps at the end of an epoch. Do not call it in the first ten or so: in those
        prototypes find their latents by themselves. In a process group call it on all ranks; they take what rank 0
        draws. The follower and ``optimizer`` forget those prototypes' past. Counting starts anew, so read
        :meth:`metrics` before.

        Args:
            z: latents in the layer's layout to choose from; those of the queue by default.
            optimizer: its state of the revived prototypes, such as Adam's moments, is set to 0.
            threshold: a prototype is dead if its share of the latents since the last reset is below it. The default is
                .1 / K, a tenth of an equal share. In balanced training the smallest share settles between .13 / K
                (K = 100) and .87 / K (K = 10; digits, 30 epochs).
            duplicates: also revive a prototype that is less than 2 std from one with more latents.
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
            raise ValueError(
                "z: expected latents to choose from, got None, and the layer has no queue. Pass z, or build the layer "
                "with queue=LatentQueue(size, latent_dim)."
            )
        group = self.ranks.active()
        index = revive(self.head, self.usage, latents, optimizer, threshold, duplicates, generator, group)
        self.follower.forget(index, whole(self.head.prototypes))
        self.reset_metrics()
        return index

    @classmethod
    def paper(cls, latent_dim: int, num_prototypes: int, **options: Any) -> Self:
        """The paper's own choices: dot scores, a sampled target, the biased statistic, a sum over prototypes.

        Bandwidth s^2 = 2 D (the paper leaves it open). Losses have weight 1, to be added or stepped on (Algorithm 1).
        There is no phase of the MMD alone, and std stays 1. Every option of the constructor overrides.
        """
        group, std = options.get("group", "default"), options.get("std")
        head = PrototypeHead(latent_dim, num_prototypes, similarity="dot", std=std, covariance="isotropic")
        head.follows_scale = False
        choices: dict[str, Any] = {
            "head": head,
            "mmd": AnchoredMMDLoss(scales=(2.0,), target="sampled", statistic="biased", reduction="sum", group=group),
            "mode": "weighted",
            "prototype_weight": 1.0,
            "mmd_weight": 1.0,
            "schedule": Schedule(mmd_steps=0),
            "follow_rate": 0.0,
        }
        return cls(latent_dim, num_prototypes, **(choices | options))

    def extra_repr(self) -> str:
        return (
            f"mode={self.mode!r}, prototype_weight={self.prototype_weight:g}, mmd_weight={self.mmd_weight:g}, "
            f"layout={self.layout.pattern!r}, schedule={self.schedule}"
        )
