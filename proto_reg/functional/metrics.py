"""Numbers that describe a latent space around its prototypes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .. import kernels  # noqa: F401  (registers torch.ops.proto_reg)
from .._checks import check_head, check_matrix, compute_dtype
from .._distributed import Group, gather_rows, resolve
from ..kernels.closed_forms import gaussian_null_variance
from .mmd import DEFAULT_SCALES

SEPARATION = 2.0  # in std: two normals that lie nearer overlap by more than 16 % (their Bayes error)


@torch.no_grad()
def latent_metrics(
    z: Tensor, head: nn.Module, labels: Tensor | None = None, *, group: Group = None
) -> dict[str, float | Tensor]:
    """Diagnose latents around the prototypes of ``head``.

    Each latent belongs to the prototype with its highest score. All distances are in units of ``head.std``, the
    standard deviation of the normal distribution around each prototype.

    Args:
        z: (N, D) latents, preferably held out.
        head: a :class:`proto_reg.PrototypeHead`, or any module with ``prototypes`` (K, D) that maps z to scores (N, K).
            Without an attribute ``std`` it is 1.
        labels: (N,) class of each latent, for purity, NMI and ACC; needs the extra ``metrics`` (scikit-learn, SciPy).
        group: a ProcessGroup, or ``"default"``: latents and labels of all its ranks are gathered, and every rank
            returns the same. N may differ and be 0. All ranks must call, either all with labels or all without.

    Returns:
        A dict of floats, and of two tensors (K,):

        * ``usage`` (K,): share of the latents at each prototype; ``perplexity``: exp of its entropy, at most K.
        * ``dead``: prototypes without a latent; ``duplicates``: prototypes less than 2 from another, inside its noise.
        * ``separation``: distance of the nearest two prototypes (inf for K = 1).
        * ``r2_per_dim``: mean |z - v|^2 / D; 1 under N(v, std^2 I).
        * ``effective_rank``: exp of the entropy of the residuals' covariance spectrum (Roy and Vetterli, 2007), at
          most D.
        * ``standardised_mmd`` (K,): unbiased MMD to N(v_k, std^2 I), divided by its standard deviation under that
          distribution; NaN for fewer than two latents. ``mean_standardised_mmd``: its mean over the other prototypes.
          Under N(v_k, std^2 I) it is 0 give or take 1. Deviations grow with the number of latents, so compare at the
          same N.
        * with labels: ``purity``, ``nmi`` and ``acc`` (best one-to-one matching of prototypes to classes).

    Raises:
        TypeError, ValueError: a wrong rank, dtype or size, named.
        ImportError: labels without the extra.
    """
    check_head(head)
    prototypes = cast(Tensor, head.prototypes)
    ranks = resolve(group)
    if ranks is not None:
        check_matrix("z", z, prototypes.shape[1], axes="(N, D)", empty=True)
        if labels is not None:
            _check_labels(labels, len(z))
            labels, _ = gather_rows(labels.to(z.device), ranks)
        z, _ = gather_rows(z, ranks)
    check_matrix("z", z, prototypes.shape[1], axes="(N, D)")
    if not bool(z.isfinite().all()):
        raise ValueError("z: expected finite latents, got NaN or infinity. Drop those rows, or look for the overflow.")
    dtype = compute_dtype(torch.promote_types(z.dtype, prototypes.dtype))
    assignments = head(z).argmax(1)
    std = getattr(head, "std", 1.0)
    z, v = z.to(dtype) / std, prototypes.to(dtype) / std
    counts = torch.bincount(assignments, minlength=len(v))
    usage = counts.to(dtype) / len(z)
    residuals = z - v[assignments]
    apart = nearest_other(v)
    standardised = _standardised_mmd(residuals, assignments, counts)
    measured = standardised[~standardised.isnan()]
    metrics: dict[str, float | Tensor] = {
        "usage": usage,
        "perplexity": torch.special.entr(usage).sum().exp().item(),
        "dead": float((counts == 0).sum()),
        "duplicates": float((apart < SEPARATION).sum()),
        "separation": apart.amin().item(),
        "r2_per_dim": residuals.square().mean().item(),
        "effective_rank": _effective_rank(residuals),
        "standardised_mmd": standardised,
        "mean_standardised_mmd": measured.mean().item(),
    }
    if labels is not None:
        metrics |= _agreement(labels, assignments)
    return metrics


def nearest_other(prototypes: Tensor) -> Tensor:
    """(K,) distance of each prototype from the nearest other one; inf for K = 1."""
    v = prototypes.detach().to(compute_dtype(prototypes.dtype))
    v = v - v.mean(0)  # products of coordinates far from the origin would swamp their differences
    rows = max(1, (1 << 22) // len(v))
    slabs = [torch.cdist(slab, v) for slab in v.split(rows)]
    return torch.cat([_off_diagonal(slab, i * rows).amin(1) for i, slab in enumerate(slabs)])


def _off_diagonal(slab: Tensor, start: int) -> Tensor:
    slab.diagonal(start).fill_(torch.inf)
    return slab


def _standardised_mmd(residuals: Tensor, assignments: Tensor, counts: Tensor) -> Tensor:
    scales, dim = list(DEFAULT_SCALES), residuals.shape[1]
    values, _ = torch.ops.proto_reg.anchored_mmd(residuals, assignments, len(counts), "gaussian", scales, True, None)
    variance = gaussian_null_variance(counts.to(values.dtype).clamp_min(2), dim, scales)
    return torch.where(counts > 1, values / variance.sqrt(), torch.nan)


def _effective_rank(residuals: Tensor) -> float:
    centred = residuals - residuals.mean(0)
    spectrum = torch.linalg.eigvalsh(centred.T.double() @ centred.double()).clamp_min(0)
    share = spectrum / spectrum.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum().exp().item()


def _check_labels(labels: Tensor, count: int) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a torch.Tensor, got {type(labels).__name__}. Wrap it with torch.as_tensor.")
    if labels.shape != (count,):
        raise ValueError(
            f"labels: expected shape {(count,)}, one for each latent, got {tuple(labels.shape)}. "
            "Pass the labels of the same examples."
        )


def _agreement(labels: Tensor, assignments: Tensor) -> dict[str, float | Tensor]:
    _check_labels(labels, len(assignments))
    try:
        from scipy.optimize import linear_sum_assignment
        from sklearn.metrics import normalized_mutual_info_score
        from sklearn.metrics.cluster import contingency_matrix
    except ImportError as error:
        raise ImportError(
            "labels: purity, NMI and ACC need scikit-learn and SciPy. Run: pip install 'proto_reg[metrics]'"
        ) from error
    truth, found = labels.cpu().numpy(), assignments.cpu().numpy()
    table = contingency_matrix(truth, found)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return {
        "purity": float(table.max(0).sum() / table.sum()),
        "nmi": float(normalized_mutual_info_score(truth, found)),
        "acc": float(table[rows, columns].sum() / table.sum()),
    }
