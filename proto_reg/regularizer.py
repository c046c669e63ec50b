"""The three components composed into one layer that goes between an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ._checks import check_choice, check_number, check_positive_int, compute_dtype
from ._distributed import Group, alone
from .assigner import SinkhornAssigner
from .balance import AttachDirection, add_up, of_a_leaf
from .components import components
from .functional.noise import with_noise
from .functional.problem import usable
from .fused import fused_step
from .head import PrototypeHead
from .kernels.follow import followed
from .kernels.once import transforming, with_slopes
from .kernels.rows import at_work, loss_of_active
from .layout import Layout
from .lifecycle import Lifecycle
from .mmd import AnchoredMMDLoss
from .output import RegularizerOutput
from .replay import saving_hooks
from .tokens import Gatherer, Share, subsample, undivided

MODES = ("balanced", "weighted")
PROTOTYPE_WARMUP = 50  # steps, by default: an epoch is better on MNIST by 2 % of error, 100 worse on the digits
# A batch of several processes with up to so many entries of latents and scores (4 MiB) is computed by each of them.
GATHERED = 1 << 20


# Direction (N, D), each parameter of the head with its step, and the output.
Step: TypeAlias = tuple[Tensor, list[tuple[nn.Parameter, Tensor]], RegularizerOutput]
# Output without its loss; gradients of the prototype loss by tokens (N, D) and parameters; that of the MMD by tokens.
Gradients: TypeAlias = tuple[RegularizerOutput, Tensor, Sequence[Tensor], Tensor]


class PrototypicalRegularizer(Lifecycle):
    """Organises the latent space of any autoencoder around prototypes: ``z, info = regularizer(encoder(x))``.

    ``mode="balanced"`` returns z unchanged (unless ``noise`` is asked for) and acts in the backward pass: where a
    gradient g arrives, the layer passes on ``g + prototype_weight |g|/|g_p| g_p + mmd_weight |g|/|g_r| g_r``, g_p and
    g_r the gradients of the two losses at the latents, norms over the batch; the prototypes get ``prototype_weight
    |g|/|g_p|`` times theirs. No loss is added and no weight depends on the size of the reconstruction loss.
    ``mode="weighted"`` leaves gradients alone: add ``info.loss`` to your own. Under ``no_grad``, in eval and during
    warm-up the layer is the identity in both passes.

    In balanced mode call ``backward`` once for each forward, on the sum of your losses. Two backward passes through one
    forward are scaled by their own norms, |g_a| + |g_b|, which is more than the |g_a + g_b| of their sum. If you need
    two, ``mode="weighted"`` gives the same gradient either way.

    Args:
        latent_dim: D.
        num_prototypes: K.
        std: standard deviation of the normal distribution around each prototype that training aims at, in the units of
            the latents: 1 or, if a head is given, the head's. Where the layer warns that latents are too close to each
            other for it, the warning says what fits.
        head, assigner, mmd: components to use instead of the default ones.
        temperature: tau of eq. 10, > 0; or ``(start, end)``, from one to the other in ``temperature_steps`` steps after
            warm-up. The assigner's epsilon belongs to ``end`` and goes along in proportion: were it fixed, codes and
            predictions would part at the start, or meet, where the gradient is 0.
        temperature_steps: see there; 0 for one temperature.
        prototype_weight, mmd_weight: lambda_p and lambda_r, >= 0: the size of each regularising gradient relative to
            the reconstruction's (balanced) or the factor of each loss (weighted).
        mode: ``"balanced"`` or ``"weighted"``.
        warmup_steps: training forward passes (with gradients enabled) of reconstruction only.
        prototype_warmup_steps: passes after those in which the MMD is at work alone: latents take their scale while the
            prototypes stay where they are. It pays in reconstruction: README, "How hard to pull". None: 50, but 0
            with ``tracking=False``, which counts no steps, or where one of the MMD's weights is 0.
        mmd_warmup_weight: lambda_r in those passes, >= 0.
        ramp_steps: passes in which a weight then grows linearly from 0.
        noise: size, >= 0, of the noise that the decoder gets in training, relative to each latent's own: the layer then
            returns ``z + noise |z| / sqrt(D) e``, e ~ N(0, I). Losses and metrics are those of z. It teaches the
            decoder the directions that latents leave empty and samples do not: README, "Noise for the decoder".
        noise_steps: passes, those of ``warmup_steps`` among them, after which there is no more noise; 0: it stays. A
            last epoch without it gives most of the error back that it costs.
        layout: einops pattern of the latents with the axis ``d``; every other position is a latent of its own:
            ``"b d"``, ``"b n d"``, ``"b d h w"``, ``"b d t h w"``.
        max_tokens: at most this many latents enter the MMD, a new subsample each step, fixed by ``seed`` and the step.
            A program of ``torch.export`` takes all of them.
        seed: of the subsample.
        follow_rate: share of the way to the most typical of their latents that prototypes go with each optimizer step,
            on top of it; 0 leaves them to the optimizer. See :class:`proto_reg.follower.PrototypeFollower`.
        soft: weigh the MMD by the codes instead of their argmax (costs a B x B product).
        queue_size: past latents that are balanced together with those of the batch; 0 for none. The prototype loss is
            that of the batch alone. See :class:`proto_reg.queue.LatentQueue`.
        queue_mmd: past latents enter the MMD too, as constants and beside ``max_tokens``.
        tracking: count steps, usage and losses, move prototypes by ``follow_rate``, fill the queue. Without it a
            training forward changes nothing in the layer, and ``mode="weighted"`` can be differentiated by
            ``torch.func``. An attribute: it may be changed at any time.
        total_steps: length of the training, if known: a warm-up as long is warned of.
        group: the processes whose latents are one batch in training mode: ``"default"`` (the default process group, if
            there is one), None (this process alone) or a ProcessGroup. All must call the layer, and run its backward
            pass, equally often; a process without latents passes an empty batch. The components that are built here
            get it too; those that are given keep their own.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """

    def __init__(
        self,
        latent_dim: int,
        num_prototypes: int,
        *,
        std: float | None = None,
        head: PrototypeHead | None = None,
        assigner: SinkhornAssigner | None = None,
        mmd: AnchoredMMDLoss | None = None,
        temperature: float | Sequence[float] = 0.1,
        temperature_steps: int = 0,
        prototype_weight: float = 0.03,
        mmd_weight: float = 0.1,
        mode: str = "balanced",
        warmup_steps: int = 0,
        prototype_warmup_steps: int | None = None,
        mmd_warmup_weight: float = 0.5,
        ramp_steps: int = 0,
        noise: float = 0.0,
        noise_steps: int = 0,
        layout: str = "b d",
        max_tokens: int = 4096,
        seed: int = 0,
        follow_rate: float = 0.02,
        soft: bool = False,
        queue_size: int = 0,
        queue_mmd: bool = False,
        tracking: bool = True,
        total_steps: int | None = None,
        group: Group = "default",
    ) -> None:
        if prototype_warmup_steps is None:
            prototype_warmup_steps = PROTOTYPE_WARMUP if tracking and mmd_weight and mmd_warmup_weight else 0
        super().__init__(
            *components(latent_dim, num_prototypes, std, soft, group, head, assigner, mmd),
            temperature=temperature,
            temperature_steps=temperature_steps,
            warmup_steps=warmup_steps,
            prototype_warmup_steps=prototype_warmup_steps,
            ramp_steps=ramp_steps,
            noise=noise,
            noise_steps=noise_steps,
            follow_rate=follow_rate,
            queue_size=queue_size,
            group=group,
        )
        self.gatherer = Gatherer()
        self.prototype_weight = check_number("prototype_weight", prototype_weight, at_least=0)
        self.mmd_weight = check_number("mmd_weight", mmd_weight, at_least=0)
        self.mmd_warmup_weight = check_number("mmd_warmup_weight", mmd_warmup_weight, at_least=0)
        self.mode = check_choice("mode", mode, MODES)
        self.layout = Layout(layout)
        self.max_tokens = check_positive_int("max_tokens", max_tokens, minimum=2)
        self.seed = check_positive_int("seed", seed, minimum=0)
        self.soft = bool(soft)
        self.tracking = bool(tracking)
        if queue_mmd and not queue_size:
            raise ValueError("queue_mmd: expected False without a queue, got True. Pass queue_size > 0.")
        self.queue_mmd = bool(queue_mmd)
        self.expect(total_steps)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, RegularizerOutput]:
        """Regularise latents ``z``, shaped as ``layout`` says; ``mask``, z's shape without d, is True where they count.

        Returns z itself (in balanced training: the same memory, or a copy of a leaf that requires a gradient; with
        ``noise``: another tensor, z and the noise) and what was computed: losses of the batch of all processes of the
        group; scores, codes and assignments of this one's.

        Raises:
            TypeError, ValueError: latents or mask of another rank, size or dtype, or an empty batch.
        """
        learning = self.training and torch.is_grad_enabled()
        tracking = learning and self.tracking
        hooks = saving_hooks() if tracking else None
        if hooks is None:
            return self._forward(z, mask, learning, tracking)
        with self.replay.state(hooks, self._changing()) as again:
            return self._forward(z, mask, learning, not again)

    def _forward(
        self, z: Tensor, mask: Tensor | None, learning: bool, tracking: bool
    ) -> tuple[Tensor, RegularizerOutput]:
        """:meth:`forward`, which says whether there is anything to learn, and whether to count it."""
        balanced = learning and self.mode == "balanced"
        tokens, keep, share = self._tokens(z, mask, balanced)
        self._check_transforms(tracking)
        noise = self._noise() if learning and self.noise else None  # before the step is counted
        if balanced:
            z, output = self._balanced(z, tokens, keep, share, tracking)
        else:
            if tracking:
                self._move()
            with torch.autocast(z.device.type, enabled=False), torch.set_grad_enabled(learning):
                output = self._losses(tokens, keep, share)
            if tracking:
                self._count(tokens.detach(), keep, output)
        if tracking:
            self._look(tokens, keep, share, output)
        if noise is not None:
            counted = None if keep is None else self.layout.restore_positions(keep, z)
            z = with_noise(z, noise, dim=self.layout.latent_axis, mask=counted)
        return z, output if self.layout.is_rows else self._to_layout(output, z)

    def _losses(self, z: Tensor, keep: Tensor | None, share: Share) -> RegularizerOutput:
        """Both losses of tokens ``z`` (N, D), whose derivatives are those of :meth:`_gradients`."""
        with torch.no_grad():
            output, by_tokens, by_parameters, by_latents = self._gradients(z.detach(), keep, share)
        prototype_loss, mmd_loss = output.prototype_loss, output.mmd_loss
        if torch.is_grad_enabled():
            by_head = [z, *self.head.parameters()], [by_tokens, *by_parameters]
            prototype_loss = with_slopes("the prototype loss", prototype_loss, *by_head)
            mmd_loss = with_slopes("the MMD", mmd_loss, [z], [by_latents])
        losses = self.prototype_weight * prototype_loss, self.mmd_weight * mmd_loss
        loss = loss_of_active(*losses, self._active(saved=True))
        return output._replace(loss=loss, prototype_loss=prototype_loss, mmd_loss=mmd_loss)

    def _balanced(
        self, z: Tensor, tokens: Tensor, keep: Tensor | None, share: Share, tracking: bool
    ) -> tuple[Tensor, RegularizerOutput]:
        """Attach the direction in which the regularisers pull to ``z``, to be scaled by whatever gradient arrives."""
        if share.whole is not None:
            # Sums on a GPU come in any order, and prototypes would drift apart: there each counts its own tokens.
            everything = tracking and tokens.is_cpu
            if tracking and not everything:
                self._move()
            with alone():
                direction, steps, output = self._step(*share.whole, undivided(*share.whole), everything)
            own = slice(share.start, share.start + tokens.shape[0])
            rows = {name: getattr(output, name)[own].clone() for name in ("scores", "codes", "assignments")}
            direction, output = direction[own], output._replace(**rows)
            # Each process has the whole step; |g|, of means over each one's own batch, is their number too large.
            steps = [(parameter, step / len(share.counts)) for parameter, step in steps]
            if tracking and not everything:
                self._count(tokens.detach(), keep, output)
        else:
            direction, steps, output = self._step(tokens, keep, share, tracking)
        counted = None if keep is None else self.layout.restore(keep[:, None], z)
        direction = direction if self.layout.is_rows else self.layout.restore(direction, z)
        attached = direction if self.prototype_weight or self.mmd_weight else None
        if not steps:  # FSDP1 has taken the parameters away: a gradient would reach none
            self.head.to_write_to()
        if of_a_leaf(z):
            z = z.clone()  # whoever writes to what is returned must not write to a parameter
        parameters, by_parameters = zip(*steps, strict=True)
        return AttachDirection.apply(share.group, z, attached, counted, *by_parameters, *parameters), output

    def _step(self, tokens: Tensor, keep: Tensor | None, share: Share, tracking: bool) -> Step:
        """What :meth:`_pull` returns for ``tokens`` (N, D), counted if ``tracking``; by one operator if it can be."""
        head, follower, by_itself = self.head, self.follower, share.group is None and self._one_group()
        plain = self.queue is None and not self.soft and share.total <= self.max_tokens
        if by_itself and plain and (self.prototype_weight or not follower.rate):
            active = self._active()
            sharpness = self._sharpness() if self.temperature_steps else None
            counters = (follower if follower.rate else None, self.meter, self.steps) if tracking else None
            weights = self.prototype_weight, self.mmd_weight
            fused = fused_step(
                tokens, keep, head, self.assigner, self.mmd, counters, active, sharpness, self.temperature, *weights
            )
            if fused is not None:
                direction, step, *rest = fused
                output = RegularizerOutput._make(rest)
                if tracking and self.assigner.adaptive and self.prototype_weight:
                    self._adapt(output, followed(output.prototype_loss, active, keep), sharpness)
                return direction, [(head.prototypes, step)], output
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.detach()
            if tracking:
                self._move()
            pulled = self._pull(tokens, keep, share)
            if tracking:
                self._count(tokens, keep, pulled[-1])
        return pulled

    def _one_group(self) -> bool:
        """Whether the components work with the processes that the layer works with."""
        return self.assigner.ranks.group == self.mmd.ranks.group == self.ranks.group

    def _most(self) -> int:
        """Tokens in all up to which every process computes the whole batch: one exchange, not one for each sum."""
        apart = not self._one_group() or self.mmd.target != "analytic" or self.queue is not None
        return 0 if apart else GATHERED // (self.head.latent_dim + self.head.num_prototypes)

    def _gradients(self, tokens: Tensor, keep: Tensor | None, share: Share) -> Gradients:
        """Both losses of tokens (N, D) and their gradients, in closed form: no graph is built here.

        The MMD's anchors are held fixed, as in Algorithm 1.
        """
        scores, pull_back = self.head.scores_and_pull_back(tokens)
        sharpened, options = self._assigner_arguments(scores, keep)
        prototype_loss, by_scores, codes = self.assigner.cross_entropy_and_gradient(
            sharpened, self.temperature, **options
        )
        assignments = (codes if self.training else scores).argmax(1)
        by_tokens, by_parameters = pull_back(by_scores * self._sharpness() if self.temperature_steps else by_scores)

        index, chosen = self._subsample(tokens.shape[0], keep, share)
        mmd_loss, by_latents = self.mmd.value_and_gradient(
            *self._mmd_arguments(tokens, codes, assignments, chosen, index)
        )
        if self.queue_mmd:  # past latents stay where they are
            by_latents = by_latents[: tokens.shape[0] if index is None else index.shape[0]]
        if index is not None:
            by_latents = torch.zeros_like(tokens).index_copy_(0, index, by_latents)
        output = self._output(prototype_loss.new_zeros(()), prototype_loss, mmd_loss, scores, codes, assignments)
        return output, by_tokens, by_parameters, by_latents

    def _pull(self, tokens: Tensor, keep: Tensor | None, share: Share) -> Step:
        """Direction (N, D) of tokens (N, D), each of the head's parameters and its step, and everything on the way."""
        output, by_tokens, by_parameters, by_latents = self._gradients(tokens, keep, share)
        active, weights = self._active(), (self.prototype_weight, self.mmd_weight)
        direction, to_prototypes = add_up(by_tokens, by_latents, *weights, share.group, active)
        steps = [at_work(to_prototypes * g, active, 0) for g in by_parameters]
        loss = loss_of_active(weights[0] * output.prototype_loss, weights[1] * output.mmd_loss, active)
        return direction, list(zip(self.head.parameters(), steps, strict=True)), output._replace(loss=loss)

    def _output(
        self, loss: Tensor, prototype_loss: Tensor, mmd_loss: Tensor, scores: Tensor, codes: Tensor, assignments: Tensor
    ) -> RegularizerOutput:
        """All of it for the batch alone: past latents stand below."""
        if self.queue is not None:
            codes, assignments = codes[: scores.shape[0]], assignments[: scores.shape[0]]
        return RegularizerOutput(loss, prototype_loss, mmd_loss, scores, codes, assignments)

    def losses(self, z: Tensor, mask: Tensor | None = None, *, count: bool = False) -> RegularizerOutput:
        """Both losses of ``z``, differentiable whatever the mode: what Algorithm 1 steps on.

        ``count``: as a training forward does, with ``tracking``; but prototypes are not moved.
        """
        count = count and self.tracking
        hooks = saving_hooks() if self.tracking else None
        if hooks is None:
            return self._both_losses(z, mask, count)
        with self.replay.state(hooks, self._changing()) as again:
            return self._both_losses(z, mask, count and not again)

    def _both_losses(self, z: Tensor, mask: Tensor | None, count: bool) -> RegularizerOutput:
        tokens, keep, share = self._tokens(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            output = self._losses(tokens, keep, share)
        if count:
            self._count(tokens.detach(), keep, output)
            self._look(tokens, keep, share, output)
        return self._to_layout(output, z)

    @classmethod
    def paper(cls, latent_dim: int, num_prototypes: int, **options: Any) -> Self:
        """The paper's own choices: dot scores, a sampled target, the biased statistic, a sum over prototypes.

        Bandwidth s^2 = 2 D (the paper leaves it open), losses of weight 1 to be added or stepped on (Algorithm 1);
        every option of the constructor overrides.
        """
        group, std = options.get("group", "default"), options.get("std")
        choices: dict[str, Any] = {
            "head": PrototypeHead(latent_dim, num_prototypes, scores="dot", std=std),
            "mmd": AnchoredMMDLoss(scales=(2.0,), target="sampled", statistic="biased", reduction="sum", group=group),
            "mode": "weighted",
            "prototype_weight": 1.0,
            "mmd_weight": 1.0,
            "prototype_warmup_steps": 0,
            "follow_rate": 0.0,
        }
        return cls(latent_dim, num_prototypes, **(choices | options))

    def _tokens(self, z: Tensor, mask: Tensor | None, balanced: bool = False) -> tuple[Tensor, Tensor | None, Share]:
        """Latents as rows (N, D) in the dtype of the computation, which of them count (N,) or None, and their share."""
        group, head, nan_policy = self.ranks.active(self.training), self.head, self.assigner.nan_policy
        tokens, keep = self.layout.tokens(z, mask, head.latent_dim, empty=group is not None)
        own = head.prototypes.dtype
        if not z.dtype == own == torch.float32:  # the common case is not to pay for the others
            tokens = tokens.to(compute_dtype(torch.promote_types(z.dtype, own)))
        if nan_policy != "propagate":
            keep = usable(tokens, keep, nan_policy, group)
        if keep is not None:
            # Whatever stands in a position that is left out, be it NaN, reaches nothing.
            tokens = torch.where(keep[:, None], tokens, 0.0)
        if group is None:
            return tokens, keep, undivided(tokens, keep)
        return tokens, keep, self.gatherer.share_of(tokens.detach(), keep, group, self._most() if balanced else 0)

    def _assigner_arguments(self, scores: Tensor, keep: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """Scores (N [+ Q], K) as the assigner takes them, and its mask: at this step's temperature, past ones below.

        Past latents are scored by the prototypes of today. They enter the balance, not the loss.
        """
        options: dict[str, Any] = {"mask": keep}
        if self.queue is not None and self.training:
            options["rows"] = scores.shape[0]
            scores, options["mask"] = self.queue.below(scores, keep, self.ranks.active(), self.head)
        return scores * self._sharpness() if self.temperature_steps else scores, options

    def _mmd_arguments(
        self, z: Tensor, codes: Tensor, assignments: Tensor, keep: Tensor | None, index: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
        """What the MMD is taken of: tokens (of ``index``) and past ones, the anchors, members, which count, and std."""
        members = codes if self.soft else assignments
        if self.queue is not None:
            members, past = members[: z.shape[0]], members[z.shape[0] :]
        if index is not None:
            z, members = z[index], members[index]
        if self.queue is not None and self.queue_mmd and self.training:
            z, keep = self.queue.below(z, keep, self.ranks.active())
            members = torch.cat([members, past])
        return z, self.head.prototypes.detach(), members, keep, self.head.std

    def _subsample(self, count: int, keep: Tensor | None, share: Share) -> tuple[Tensor | None, Tensor | None]:
        """Indices of the tokens that may enter the MMD, None for all, and which of these do; None for all of them."""
        # An exporter would take the comparison for a bound on the number of latents.
        if torch.compiler.is_exporting() or share.total <= self.max_tokens:
            return None, keep
        return subsample(count, keep, share, self.max_tokens, self._now(), self.seed)

    def _check_transforms(self, tracking: bool) -> None:
        """RuntimeError under a ``torch.func`` transform that this layer, as it is set, cannot go through."""
        if not transforming():
            return
        if tracking or (self.training and self.mode == "balanced"):
            raise RuntimeError(
                f"torch.func: expected a layer with mode='weighted' and tracking=False, got mode={self.mode!r} and "
                f"tracking={self.tracking}. A pure function keeps no count and acts on no other gradient; layer.losses "
                "does neither."
            )

    def _to_layout(self, output: RegularizerOutput, z: Tensor) -> RegularizerOutput:
        return output._replace(
            scores=self.layout.restore(output.scores, z),
            codes=self.layout.restore(output.codes, z),
            assignments=self.layout.restore_positions(output.assignments, z),
        )

    def extra_repr(self) -> str:
        return (
            f"mode={self.mode!r}, temperature={self.temperature:g}, prototype_weight={self.prototype_weight:g}, "
            f"mmd_weight={self.mmd_weight:g}, warmup_steps={self.warmup_steps}, "
            f"prototype_warmup_steps={self.prototype_warmup_steps}, noise={self.noise:g}, "
            f"layout={self.layout.pattern!r}"
        )
