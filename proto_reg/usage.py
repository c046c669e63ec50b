"""What a layer saw since the last reset: how often each prototype was nearest, and the mean losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ._distributed import Group, Ranks, sum_
from ._state import Record
from .functional.metrics import SEPARATION, nearest_other
from .kernels.layer_ops import tally


class UsageMeter(Record):
    """Counts over the training steps since the last reset, on their device. Only a read waits for the device.

    A latent counts for the prototype with its highest score, as in inference. Balanced codes would hide unused
    prototypes: they give each its share even if no latent is near.

    In a process group each step is summed over the ranks. So all ranks hold the same state, and any of them may read it
    alone. DistributedDataParallel's broadcast of buffers does no harm, and the checkpoint of one rank resumes all.

    Args:
        num_prototypes: K.
        group: the processes: ``"default"``, None or a ProcessGroup.

    Attributes:
        counts: (K,) int64 latents of each prototype.
        totals: (4,) float32 sums of prototype loss, MMD loss, passes, and squared distance from the prototype per
            dimension.
    """

    counts: Tensor
    totals: Tensor

    def __init__(self, num_prototypes: int, *, group: Group = "default") -> None:
        super().__init__()
        self.ranks = Ranks(group)
        self.register_buffer("counts", torch.zeros(num_prototypes, dtype=torch.int64))
        self.register_buffer("totals", torch.zeros(4, dtype=torch.float32))

    def observe(
        self,
        tokens: Tensor,
        scores: Tensor,
        prototypes: Tensor,
        losses: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
    ) -> None:
        """Count the finite latents among ``tokens`` (N, D) with ``scores`` (N, K), where ``mask`` (N,) is True."""
        group = self.ranks.active()
        pass_of_rank = tokens, scores, prototypes, mask, *losses
        if group is None:
            tally(self.counts, self.totals, *pass_of_rank)
            return
        counts, totals = torch.zeros_like(self.counts), torch.zeros_like(self.totals)
        tally(counts, totals, *pass_of_rank)
        both = sum_(torch.cat([counts.double(), totals.double()]), group)
        self.counts.add_(both[: len(counts)].to(torch.int64))
        self.totals.add_(both[len(counts) :].to(totals.dtype))

    @property
    def usage(self) -> Tensor:
        """(K,) float32 share of the latents at each prototype; zeros if none was counted."""
        return self.counts.to(torch.float32) / self.counts.sum().clamp_min(1)

    @torch.no_grad()
    def metrics(self, prototypes: Tensor, std: float, **others: Tensor) -> dict[str, float]:
        """Everything as floats, in one read. Distances are in units of ``std``. NaN means that nothing was counted."""
        usage, latents = self.usage, self.counts.sum()
        prototype_loss, mmd_loss, passes, distance = self.totals.unbind()
        apart = nearest_other(prototypes) / std
        nothing = latents == 0
        figures = {
            "prototype_loss": prototype_loss / passes,
            "mmd_loss": mmd_loss / passes,
            "perplexity": torch.where(nothing, torch.nan, torch.special.entr(usage).sum().exp()),
            "dead": torch.where(nothing, torch.nan, (self.counts == 0).sum(dtype=torch.float32)),
            "duplicates": (apart < SEPARATION).sum(),
            "separation": apart.amin(),
            "r2_per_dim": distance / latents / std**2,
        } | others
        values = torch.stack([figure.to(torch.float32) for figure in figures.values()])
        return dict(zip(figures, values.tolist(), strict=True))
