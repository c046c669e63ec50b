"""The three components composed into one layer that goes between an encoder and a decoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ._checks import check_choice, check_instance, check_number, check_positive_int, compute_dtype
from ._warnings import LayerWatch
from .assigner import SinkhornAssigner
from .follower import PrototypeFollower
from .functional.problem import check_marginals, check_no_nan
from .head import PrototypeHead
from .kernels.rows import balance
from .layout import Layout
from .mmd import AnchoredMMDLoss

MODES = ("balanced", "weighted")


class RegularizerOutput(NamedTuple):
    """What the layer computed; positions follow the layout of the latents.

    Attributes:
        loss: () prototype_weight * prototype_loss + mmd_weight * mmd_loss; 0 during warm-up. Differentiable in
            ``mode="weighted"`` only.
        prototype_loss: () cross-entropy of eq. 10.
        mmd_loss: () anchored MMD of eq. 5.
        scores: (B, K), or the layout with K in the place of D.
        codes: like ``scores``; K entries of each position sum to 1.
        assignments: (B,) int64, or the layout without D: argmax of the codes in training, of the scores in eval.
    """

    loss: Tensor
    prototype_loss: Tensor
    mmd_loss: Tensor
    scores: Tensor
    codes: Tensor
    assignments: Tensor


class PrototypicalRegularizer(nn.Module):
    """Organises the latent space of any autoencoder around prototypes: ``z, info = regularizer(encoder(x))``.

    ``mode="balanced"`` returns z unchanged and acts in the backward pass: where a gradient g arrives, the layer passes
    on ``g + prototype_weight |g|/|g_p| g_p + mmd_weight |g|/|g_r| g_r``, g_p and g_r the gradients of the two losses at
    the latents, norms over the batch; the prototypes get ``prototype_weight |g|/|g_p|`` times theirs. No loss is added
    and no weight depends on the size of the reconstruction loss. ``mode="weighted"`` leaves gradients alone: add
    ``info.loss`` to your own. Under ``no_grad``, in eval and during warm-up the layer is the identity in both passes.

    Args:
        latent_dim: D.
        num_prototypes: K.
        head, assigner, mmd: components to use instead of the default ones.
        temperature: tau of eq. 10, > 0.
        prototype_weight, mmd_weight: lambda_p and lambda_r, >= 0: the size of each regularising gradient relative to
            the reconstruction's (balanced) or the factor of each loss (weighted).
        mode: ``"balanced"`` or ``"weighted"``.
        warmup_steps: training forward passes (with gradients enabled) of reconstruction only.
        layout: einops pattern of the latents with the axis ``d``; every other position is a latent of its own:
            ``"b d"``, ``"b n d"``, ``"b d h w"``, ``"b d t h w"``.
        max_tokens: at most this many latents enter the MMD, a new subsample each step, fixed by ``seed`` and the step.
        seed: of the subsample.
        follow_rate: share of the way to the mean of their latents that prototypes go with each optimizer step, on top
            of it; 0 leaves them to the optimizer. See :class:`proto_reg.follower.PrototypeFollower`.
        soft: weigh the MMD by the codes instead of their argmax (costs a B x B product).
        total_steps: length of the training, if known: a warm-up as long is warned of.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """

    steps: Tensor

    def __init__(
        self,
        latent_dim: int,
        num_prototypes: int,
        *,
        head: PrototypeHead | None = None,
        assigner: SinkhornAssigner | None = None,
        mmd: AnchoredMMDLoss | None = None,
        temperature: float = 0.1,
        prototype_weight: float = 0.1,
        mmd_weight: float = 0.1,
        mode: str = "balanced",
        warmup_steps: int = 0,
        layout: str = "b d",
        max_tokens: int = 4096,
        seed: int = 0,
        follow_rate: float = 0.02,
        soft: bool = False,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.head = PrototypeHead(latent_dim, num_prototypes) if head is None else head
        self.assigner = SinkhornAssigner() if assigner is None else assigner
        self.mmd = AnchoredMMDLoss() if mmd is None else mmd
        self._check_components(latent_dim, num_prototypes, soft)
        self.temperature = check_number("temperature", temperature, above=0)
        self.prototype_weight = check_number("prototype_weight", prototype_weight, at_least=0)
        self.mmd_weight = check_number("mmd_weight", mmd_weight, at_least=0)
        self.mode = check_choice("mode", mode, MODES)
        self.warmup_steps = check_positive_int("warmup_steps", warmup_steps, minimum=0)
        self.layout = Layout(layout)
        self.max_tokens = check_positive_int("max_tokens", max_tokens, minimum=2)
        self.seed = check_positive_int("seed", seed, minimum=0)
        self.soft = bool(soft)
        if total_steps is not None:
            check_positive_int("total_steps", total_steps)
        self.follower = PrototypeFollower(self.head.prototypes, follow_rate)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.watch = LayerWatch()
        self.watch.at_construction(
            epsilon=self.assigner.epsilon,
            temperature=temperature,
            latent_dim=latent_dim,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
        )

    def _check_components(self, latent_dim: int, num_prototypes: int, soft: bool) -> None:
        """TypeError or ValueError for components that are not ours or do not fit together."""
        check_instance("head", self.head, PrototypeHead)
        check_instance("assigner", self.assigner, SinkhornAssigner)
        check_instance("mmd", self.mmd, AnchoredMMDLoss)
        if (self.head.latent_dim, self.head.num_prototypes) != (latent_dim, num_prototypes):
            raise ValueError(
                f"head: expected latent_dim={latent_dim} and num_prototypes={num_prototypes}, got "
                f"{self.head.latent_dim} and {self.head.num_prototypes}. Build both with the same sizes."
            )
        if self.assigner.marginals is not None:
            check_marginals(self.assigner.marginals, num_prototypes)
        if soft and self.mmd.target == "sampled":
            raise ValueError("soft: expected False with a sampled target, got True. Use target='analytic' in mmd.")

    def forward(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, RegularizerOutput]:
        """Regularise latents ``z``, shaped as ``layout`` says; ``mask``, z's shape without d, is True where they count.

        Returns z itself (in balanced training: the same memory) and what was computed. In a process group each training
        forward sums the latents of each prototype over the default group; all ranks must take part.

        Raises:
            TypeError, ValueError: latents or mask of another rank, size or dtype, or an empty batch.
        """
        tokens, keep = self._tokens(z, mask)
        learning = self.training and torch.is_grad_enabled()
        if learning:
            self.follower.move(self.head.prototypes)
        with torch.autocast(z.device.type, enabled=False):
            if learning and self.mode == "balanced":
                z, output = self._balanced(z, tokens.detach(), keep)
            else:
                with torch.set_grad_enabled(learning):
                    output = self._losses(tokens, keep)
        if learning:
            if self.prototype_weight and self.head.num_prototypes > 1:
                counted = self._active() if keep is None else keep & self._active()
                self.follower.observe(tokens.detach(), output.assignments, counted)
            self.steps.add_(1)
            self.watch.at_step(
                tokens, self.head.prototypes, output.assignments, output.prototype_loss, self.steps - self.warmup_steps
            )
        return z, self._to_layout(output, z)

    def _losses(self, z: Tensor, keep: Tensor | None) -> RegularizerOutput:
        """Both losses of tokens ``z`` (N, D) by autograd; the MMD's anchors are held fixed, as in Algorithm 1."""
        scores = self.head(z)
        prototype_loss, codes = self.assigner.cross_entropy(scores, self.temperature, keep)
        assignments = (codes if self.training else scores).argmax(1)
        index = self._subsample(len(z), keep)
        mmd_loss = self.mmd(*self._mmd_arguments(z, codes, assignments, keep, index))
        loss = self.prototype_weight * prototype_loss + self.mmd_weight * mmd_loss
        loss = loss if self.warmup_steps == 0 else torch.where(self._active(), loss, 0.0)
        return RegularizerOutput(loss, prototype_loss, mmd_loss, scores, codes, assignments)

    def _balanced(self, z: Tensor, tokens: Tensor, keep: Tensor | None) -> tuple[Tensor, RegularizerOutput]:
        """Attach the direction in which the regularisers pull to ``z``, to be scaled by whatever gradient arrives."""
        with torch.no_grad():
            # Both losses and the scores know their gradients in closed form: no graph is built here.
            scores, pull_back = self.head.scores_and_pull_back(tokens)
            prototype_loss, by_scores, codes = self.assigner.cross_entropy_and_gradient(scores, self.temperature, keep)
            assignments = codes.argmax(1)
            by_tokens, by_parameters = pull_back(by_scores)

            index = self._subsample(len(tokens), keep)
            mmd_loss, by_latents = self.mmd.value_and_gradient(
                *self._mmd_arguments(tokens, codes, assignments, keep, index)
            )
            if index is not None:
                by_latents = torch.zeros_like(tokens).index_copy_(0, index, by_latents)

            direction, to_prototypes = balance(by_tokens, by_latents, self.prototype_weight, self.mmd_weight)
            steps = [to_prototypes * g for g in by_parameters]
            loss = self.prototype_weight * prototype_loss + self.mmd_weight * mmd_loss
            if self.warmup_steps:
                active = self._active()
                direction, *steps, loss = (torch.where(active, x, 0.0) for x in (direction, *steps, loss))
            counted = None if keep is None else self.layout.restore(keep[:, None], z)
        z = _AttachDirection.apply(z, self.layout.restore(direction, z), counted, *steps, *self.head.parameters())
        return z, RegularizerOutput(loss, prototype_loss, mmd_loss, scores, codes, assignments)

    def losses(self, z: Tensor, mask: Tensor | None = None) -> RegularizerOutput:
        """Both losses of ``z``, differentiable whatever the mode and uncounted: what Algorithm 1 steps on."""
        tokens, keep = self._tokens(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            return self._to_layout(self._losses(tokens, keep), z)

    @classmethod
    def paper(cls, latent_dim: int, num_prototypes: int, **options: Any) -> Self:
        """The paper's own choices: dot scores, a sampled target, the biased statistic, a sum over prototypes.

        Bandwidth s^2 = 2 D (the paper leaves it open), losses of weight 1 to be added or stepped on (Algorithm 1);
        every option of the constructor overrides.
        """
        choices: dict[str, Any] = {
            "head": PrototypeHead(latent_dim, num_prototypes, scores="dot"),
            "mmd": AnchoredMMDLoss(scales=(2.0,), target="sampled", statistic="biased", reduction="sum"),
            "mode": "weighted",
            "prototype_weight": 1.0,
            "mmd_weight": 1.0,
            "follow_rate": 0.0,
        }
        return cls(latent_dim, num_prototypes, **(choices | options))

    def _tokens(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Latents as rows (N, D) in the dtype of the computation, and which of them count (N,) or None."""
        tokens, keep = self.layout.tokens(z, mask, self.head.latent_dim)
        tokens = tokens.to(compute_dtype(torch.promote_types(z.dtype, self.head.prototypes.dtype)))
        if self.assigner.nan_policy == "raise":
            check_no_nan("z", tokens if keep is None else tokens[keep])
        if self.assigner.nan_policy == "isolate":
            finite = tokens.isfinite().all(1)
            keep = finite if keep is None else keep & finite
        if keep is not None:
            # Whatever stands in a position that is left out, be it NaN, reaches nothing.
            tokens = torch.where(keep[:, None], tokens, 0.0)
        return tokens, keep

    def _mmd_arguments(
        self, z: Tensor, codes: Tensor, assignments: Tensor, keep: Tensor | None, index: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the MMD is taken of: all tokens, or those of ``index``; the anchors held fixed."""
        members = codes if self.soft else assignments
        if index is not None:
            z, members, keep = z[index], members[index], None if keep is None else keep[index]
        return z, self.head.prototypes.detach(), members, keep

    def _subsample(self, count: int, keep: Tensor | None) -> Tensor | None:
        """Indices (max_tokens,) of the tokens that enter the MMD, a function of seed and step; None for all."""
        if count <= self.max_tokens:
            return None
        # A hash for each token (splitmix64's mixing) leaves the user's random stream alone and resumes exactly.
        key = torch.arange(count, device=self.steps.device) + self.steps * 1_000_003 + self.seed % 2**31 * 0x5851F42D
        for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
            key = (key ^ (key >> 29)) * multiplier
        key = key ^ (key >> 32)
        if keep is not None:
            key = torch.where(keep, key, torch.iinfo(torch.int64).max)
        return key.topk(self.max_tokens, largest=False).indices

    def _active(self) -> Tensor:
        """Whether warm-up is over, as a tensor: the answer never leaves the device."""
        return self.steps >= self.warmup_steps

    def _to_layout(self, output: RegularizerOutput, z: Tensor) -> RegularizerOutput:
        return output._replace(
            scores=self.layout.restore(output.scores, z),
            codes=self.layout.restore(output.codes, z),
            assignments=self.layout.restore_positions(output.assignments, z),
        )

    def extra_repr(self) -> str:
        return (
            f"mode={self.mode!r}, temperature={self.temperature:g}, prototype_weight={self.prototype_weight:g}, "
            f"mmd_weight={self.mmd_weight:g}, warmup_steps={self.warmup_steps}, layout={self.layout.pattern!r}"
        )


class _AttachDirection(torch.autograd.Function):
    """Identity whose backward adds |g| times a direction known beforehand, and gives the head |g| times its steps."""

    @staticmethod
    def forward(ctx, z: Tensor, direction: Tensor, counted: Tensor | None, *steps_and_parameters: Tensor) -> Tensor:
        steps = steps_and_parameters[: len(steps_and_parameters) // 2]
        ctx.save_for_backward(direction, counted, *steps)
        # Not a view, which could not be written to: decoders may begin with an in-place ReLU.
        return z.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        direction, counted, *steps = ctx.saved_tensors
        # In the direction's float32: the norm of a half-precision gradient under loss scaling overflows its dtype.
        wide = gradient.to(direction.dtype)
        norm = torch.linalg.vector_norm(wide if counted is None else torch.where(counted, wide, 0.0))
        by_z = gradient + (norm * direction).to(gradient.dtype)
        return by_z, None, None, *([None] * len(steps)), *(norm * step for step in steps)
