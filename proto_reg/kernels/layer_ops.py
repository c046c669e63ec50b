"""What the layer does to latents and prototypes row by row.

Each function has a plain-torch reference. On float32 tensors on the CPU one compiled operator replaces the reference's
handful of torch operators: on small batches their number is the layer's cost. Everywhere else the reference runs;
autograd and torch.compile see through it. The operators have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import backends


def unit_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``x`` (N, D) at length 1, and 1 / |x_i| (N, 1). A row of zeros stays, with 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = torch.where(norm > 1e-12, norm, 1.0)
    return x / norm, 1 / norm


def unit_rows_pull_back_reference(gradient: Tensor, unit: Tensor, inverse_norms: Tensor) -> Tensor:
    """The gradient by x (N, D) from the ``gradient`` by its unit rows."""
    return (gradient - (gradient * unit).sum(-1, keepdim=True) * unit) * inverse_norms


def balance_reference(a: Tensor, b: Tensor, weight_a: float, weight_b: float) -> tuple[Tensor, Tensor]:
    """weight_a a / |a| + weight_b b / |b|, norms over everything, and weight_a / |a| (); 0 for a gradient of 0."""
    norms = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    return add_at_weights(a, b, norms, weight_a, weight_b)


def add_at_weights(
    a: Tensor, b: Tensor, norms: Sequence[Tensor], weight_a: float, weight_b: float, shares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`balance_reference` of gradients with known ``norms`` (), each times its share; see :func:`times_share`."""
    scale_a, scale_b = (w * torch.where(n > 0, 1 / n, 0.0) for w, n in zip((weight_a, weight_b), norms, strict=True))
    a, b = scale_a * a, scale_b * b
    return a + b if shares is None else times_share(a, shares, 0) + times_share(b, shares, 1), scale_a


def loss_of_shares(of_prototypes: Tensor, of_mmd: Tensor, shares: Tensor | None) -> Tensor:
    """The sum () of the two weighted losses (), each times its share; see :func:`times_share`."""
    if shares is None:
        return of_prototypes + of_mmd
    return torch.where(shares > 0, shares * torch.stack([of_prototypes, of_mmd]), 0.0).sum()


def times_share(x: Tensor, shares: Tensor | None, loss: int) -> Tensor:
    """``x`` times the share of its full size that the weight of the ``loss`` has. With share 0 it is 0, even for NaN.

    ``loss`` is 0 for the prototype loss and 1 for the MMD. ``shares`` is (2,), or () if both have the same share; None
    stands for 1.
    """
    if shares is None:
        return x
    share = share_of(shares, loss)
    return torch.where(share > 0, share * x, 0.0)


def share_of(shares: Tensor, loss: int) -> Tensor:
    """() of ``shares`` () or (2,); see :func:`times_share`."""
    return shares[loss] if shares.ndim else shares


def attach_reference(gradient: Tensor, direction: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """``gradient + |gradient| direction``, norm over everything, and ``|gradient| step``, of a parameter (K, D)."""
    norm = torch.linalg.vector_norm(gradient)
    return gradient + norm * direction, norm * step


def typical_sums_reference(
    x: Tensor, index: Tensor, mask: Tensor | None, prototypes: Tensor, std: float = 1.0
) -> Tensor:
    """(K, D + 1): for each of ``prototypes`` (K, D) a weighted sum of its finite rows of ``x`` (N, D), and the weight.

    A row at distance r from its prototype, in units of ``std``, has the weight (1 + |r|^2 / D)^-2: the nearer, the more
    typical. The weighted mean lies uphill in the density of the rows under the inverse multiquadric D / (D + |r|^2)
    (mean shift; Cheng, 1995). The plain mean may lie between two kinds of rows; this one does not.

    Args:
        index: (N,) int64 in [0, K), the prototype of each row.
        mask: (N,) or () bool, True where a row counts; None for all.
    """
    usable = _usable(x, mask)[:, None]
    residuals = x - prototypes.to(x.dtype)[index]
    weight = torch.where(usable, (1 + residuals.square().mean(1, keepdim=True) / std**2) ** -2, 0.0)
    rows = torch.cat([torch.where(usable, x, 0.0) * weight, weight], 1)
    return rows.new_zeros(len(prototypes), rows.shape[1]).index_add(0, index, rows)


def tally_reference(
    counts: Tensor,
    totals: Tensor,
    x: Tensor,
    scores: Tensor,
    prototypes: Tensor,
    mask: Tensor | None,
    prototype_loss: Tensor,
    mmd_loss: Tensor,
) -> None:
    """Count a training step, in place.

    Args:
        counts: (K,) int64. Each finite row of ``x`` (N, D) adds 1 for the prototype of (K, D) with its highest score;
            ``scores`` is (N, K).
        totals: (4,) float32: both losses, steps, and the squared distance of those rows from that prototype per
            dimension.
        mask: (N,) bool, True where a row counts; None for all.
    """
    usable, nearest = _usable(x, mask), scores.argmax(1)
    distance = torch.where(usable, (x - prototypes.to(x.dtype)[nearest]).square().mean(1), 0.0).sum()
    counts.index_add_(0, nearest, usable.to(counts.dtype))
    totals += torch.stack([prototype_loss, mmd_loss, torch.ones_like(distance), distance]).to(totals.dtype)


def remember_reference(ring: Tensor, written: Tensor, x: Tensor, mask: Tensor | None, at_once: int) -> None:
    """Write rows of ``x`` (N, D) over the oldest of ``ring`` (Q, D), in place. Zeros stand for one that does not count.

    Args:
        written: () int64 number of rows written so far, which is added to. Row number n is in slot n % Q.
        mask: (N,) bool, True where a row counts; None for all.
        at_once: of more rows every n-th one is taken, beginning with another one at each call.
    """
    if x.shape[0] > at_once:
        stride = x.shape[0] // at_once
        chosen = torch.arange(at_once, device=x.device) * stride + written // at_once % stride
        x, mask = x[chosen], None if mask is None else mask[chosen]
    slots = (torch.arange(x.shape[0], device=x.device) + written) % ring.shape[0]
    ring.index_copy_(0, slots, torch.where(_usable(x, mask)[:, None], x, 0.0).to(ring.dtype))
    written.add_(x.shape[0])


def _usable(x: Tensor, mask: Tensor | None) -> Tensor:
    finite = x.isfinite().all(1)
    return finite if mask is None else finite & mask


def ordinary(*tensors: Tensor) -> bool:
    """Whether the tensors are float32 on the CPU, and nothing but tensors."""
    for tensor in tensors:
        # A subclass, such as a parameter that is spread over processes, goes its own ways.
        plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
        if not (plain and tensor.dtype is torch.float32 and tensor.is_cpu):
            return False
    return True


def compiled(*matrices: Tensor) -> bool:
    """Whether these operators take the matrices: :func:`ordinary`, no graph wanted, and the library is there."""
    for matrix in matrices:
        if matrix.ndim != 2:
            return False
    return not torch.is_grad_enabled() and ordinary(*matrices) and backends.choose("auto", matrices[0]) == "cpu"


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`unit_rows_reference`, compiled where it can be."""
    return torch.ops.proto_reg.unit_rows.default(x) if compiled(x) else unit_rows_reference(x)


def unit_rows_pull_back(gradient: Tensor, unit: Tensor, inverse_norms: Tensor) -> Tensor:
    """:func:`unit_rows_pull_back_reference`, compiled where it can be."""
    arguments = (gradient, unit, inverse_norms)
    operator = torch.ops.proto_reg.unit_rows_pull_back.default
    return operator(*arguments) if compiled(*arguments) else unit_rows_pull_back_reference(*arguments)


def balance(a: Tensor, b: Tensor, weight_a: float, weight_b: float) -> tuple[Tensor, Tensor]:
    """:func:`balance_reference`, compiled where it can be."""
    form = torch.ops.proto_reg.balance.default if compiled(a, b) else balance_reference
    return form(a, b, weight_a, weight_b)


def attach(gradient: Tensor, direction: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`attach_reference`, compiled where it can be; in its place gradients of any number of axes."""
    single = ordinary(gradient, direction) and compiled(step)
    form = torch.ops.proto_reg.attach.default if single else attach_reference
    return form(gradient, direction, step)


def typical_sums(x: Tensor, index: Tensor, mask: Tensor | None, prototypes: Tensor, std: float = 1.0) -> Tensor:
    """:func:`typical_sums_reference`, compiled where it can be."""
    form = torch.ops.proto_reg.typical_sums.default if compiled(x, prototypes) else typical_sums_reference
    return form(x, index, mask, prototypes, std)


def tally(
    counts: Tensor,
    totals: Tensor,
    x: Tensor,
    scores: Tensor,
    prototypes: Tensor,
    mask: Tensor | None,
    prototype_loss: Tensor,
    mmd_loss: Tensor,
) -> None:
    """:func:`tally_reference` as an operator: torch.compile must not undo what it wrote. Compiled where it can be."""
    single = compiled(x, scores, prototypes) and totals.dtype == prototype_loss.dtype == mmd_loss.dtype == torch.float32
    operator = torch.ops.proto_reg.tally_float32 if single else torch.ops.proto_reg.tally
    operator.default(counts, totals, x, scores, prototypes, mask, prototype_loss, mmd_loss)


_DEFINITIONS: dict[Callable[..., object], str] = {
    unit_rows_reference: "unit_rows(Tensor x) -> (Tensor unit, Tensor inverse_norms)",
    unit_rows_pull_back_reference: "unit_rows_pull_back(Tensor gradient, Tensor unit, Tensor inverse_norms) -> Tensor",
    balance_reference: (
        "balance(Tensor a, Tensor b, float weight_a, float weight_b) -> (Tensor direction, Tensor scale)"
    ),
    attach_reference: "attach(Tensor gradient, Tensor direction, Tensor step) -> (Tensor by_z, Tensor by_parameter)",
    typical_sums_reference: (
        "typical_sums(Tensor x, Tensor index, Tensor? mask, Tensor prototypes, float std) -> Tensor"
    ),
}
for _function, _signature in _DEFINITIONS.items():
    _name, _, _rest = _signature.partition("(")
    torch.library.define(f"proto_reg::{_name}", f"({_rest}")
    torch.library.impl(f"proto_reg::{_name}", "CompositeExplicitAutograd")(_function)
    torch.library.register_fake(f"proto_reg::{_name}")(_function)

_TALLY = (
    "(Tensor(a!) counts, Tensor(b!) totals, Tensor x, Tensor scores, Tensor prototypes, Tensor? mask, "
    "Tensor prototype_loss, Tensor mmd_loss) -> ()"
)
for _name in ("tally", "tally_float32"):  # only the second has a compiled kernel
    torch.library.define(f"proto_reg::{_name}", _TALLY)
    torch.library.impl(f"proto_reg::{_name}", "CompositeExplicitAutograd")(tally_reference)
    torch.library.register_fake(f"proto_reg::{_name}")(lambda *arguments: None)
