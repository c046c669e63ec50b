"""What the layer does to latents and prototypes row by row: plain-torch functions, and operators with compiled kernels.

On float32 tensors on the CPU one operator takes the place of the handful of torch's that each function is made of: on
small batches their number is what a layer costs. Everywhere else the functions are ordinary torch code, which autograd
and torch.compile see through. Operators have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import backends


def unit_rows_plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``x`` (N, D) at length 1, and 1 / |x_i| (N, 1). A row of zeros stays, with 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = torch.where(norm > 1e-12, norm, 1.0)
    return x / norm, 1 / norm


def unit_rows_pull_back_plain(gradient: Tensor, unit: Tensor, inverse_norms: Tensor) -> Tensor:
    """The gradient by x (N, D) from the ``gradient`` by its unit rows."""
    return (gradient - (gradient * unit).sum(-1, keepdim=True) * unit) * inverse_norms


def balance_plain(a: Tensor, b: Tensor, weight_a: float, weight_b: float) -> tuple[Tensor, Tensor]:
    """weight_a a / |a| + weight_b b / |b|, norms over everything, and weight_a / |a| (); 0 for a gradient of 0."""
    norms = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    return add_at_weights(a, b, norms, weight_a, weight_b)


def add_at_weights(
    a: Tensor, b: Tensor, norms: Sequence[Tensor], weight_a: float, weight_b: float, active: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`balance_plain` of gradients whose ``norms`` () are known, of each the share that is ``active``."""
    scale_a, scale_b = (w * torch.where(n > 0, 1 / n, 0.0) for w, n in zip((weight_a, weight_b), norms, strict=True))
    return sum_of_active(scale_a * a, scale_b * b, active), scale_a


def sum_of_active(of_prototypes: Tensor, of_mmd: Tensor, active: Tensor | None) -> Tensor:
    """What the prototype loss and what the MMD contributes, of each the share that is :func:`at_work`; None: all."""
    if active is None:
        return of_prototypes + of_mmd
    return at_work(of_prototypes, active, 0) + at_work(of_mmd, active, 1)


def loss_of_active(of_prototypes: Tensor, of_mmd: Tensor, active: Tensor | None) -> Tensor:
    """:func:`sum_of_active` of numbers (), in half as many operators."""
    if active is None:
        return of_prototypes + of_mmd
    return torch.where(active > 0, active * torch.stack([of_prototypes, of_mmd]), 0.0).sum()


def at_work(x: Tensor, active: Tensor | None, loss: int) -> Tensor:
    """``x`` times the share of its usual size that the weight of the ``loss`` has; at 0 nothing, be ``x`` NaN.

    ``loss`` is 0 for the prototype loss and 1 for the MMD; ``active`` is (2,), or () where both have the same share;
    None: all.
    """
    if active is None:
        return x
    share = share_of(active, loss)
    return torch.where(share > 0, share * x, 0.0)


def share_of(active: Tensor, loss: int) -> Tensor:
    """() of ``active`` () or (2,), see :func:`at_work`."""
    return active[loss] if active.ndim else active


def attach_plain(gradient: Tensor, direction: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """``gradient + |gradient| direction``, norm over everything, and ``|gradient| step``, of a parameter (K, D)."""
    norm = torch.linalg.vector_norm(gradient)
    return gradient + norm * direction, norm * step


def typical_sums_plain(
    x: Tensor, index: Tensor, counted: Tensor | None, prototypes: Tensor, std: float = 1.0
) -> Tensor:
    """(K, D + 1): for each of ``prototypes`` (K, D) a weighted sum of its finite rows of ``x`` (N, D), and the weight.

    A row at r from its prototype, in units of ``std``, weighs (1 + |r|^2 / D)^-2: the nearer, the more typical. The
    weighted mean lies uphill in the density of the rows under the inverse multiquadric D / (D + |r|^2) (mean shift;
    Cheng, 1995), and not between two kinds of them, as the mean may. ``index`` (N,) int64 in [0, K); ``counted`` (N,)
    or () bool, False leaves the row out.
    """
    usable = _usable(x, counted)[:, None]
    residuals = x - prototypes.to(x.dtype)[index]
    weight = torch.where(usable, (1 + residuals.square().mean(1, keepdim=True) / std**2) ** -2, 0.0)
    rows = torch.cat([torch.where(usable, x, 0.0) * weight, weight], 1)
    return rows.new_zeros(len(prototypes), rows.shape[1]).index_add(0, index, rows)


def tally_plain(
    counts: Tensor,
    totals: Tensor,
    x: Tensor,
    scores: Tensor,
    prototypes: Tensor,
    counted: Tensor | None,
    prototype_loss: Tensor,
    mmd_loss: Tensor,
) -> None:
    """Add a training pass up, in place.

    Args:
        counts: (K,) int64, finite rows of ``x`` (N, D) that score (N, K) highest with each of ``prototypes`` (K, D).
        totals: (4,) float32: both losses, passes, squared distance of those rows from that prototype per dimension.
        counted: (N,) bool, False leaves the row out.
    """
    usable, nearest = _usable(x, counted), scores.argmax(1)
    distance = torch.where(usable, (x - prototypes.to(x.dtype)[nearest]).square().mean(1), 0.0).sum()
    counts.index_add_(0, nearest, usable.to(counts.dtype))
    totals += torch.stack([prototype_loss, mmd_loss, torch.ones_like(distance), distance]).to(totals.dtype)


def _usable(x: Tensor, counted: Tensor | None) -> Tensor:
    finite = x.isfinite().all(1)
    return finite if counted is None else finite & counted


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
    """:func:`unit_rows_plain`, compiled where it can be."""
    return torch.ops.proto_reg.unit_rows.default(x) if compiled(x) else unit_rows_plain(x)


def unit_rows_pull_back(gradient: Tensor, unit: Tensor, inverse_norms: Tensor) -> Tensor:
    """:func:`unit_rows_pull_back_plain`, compiled where it can be."""
    arguments = (gradient, unit, inverse_norms)
    operator = torch.ops.proto_reg.unit_rows_pull_back.default
    return operator(*arguments) if compiled(*arguments) else unit_rows_pull_back_plain(*arguments)


def balance(a: Tensor, b: Tensor, weight_a: float, weight_b: float) -> tuple[Tensor, Tensor]:
    """:func:`balance_plain`, compiled where it can be."""
    form = torch.ops.proto_reg.balance.default if compiled(a, b) else balance_plain
    return form(a, b, weight_a, weight_b)


def attach(gradient: Tensor, direction: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`attach_plain`, compiled where it can be; in its place gradients of any number of axes."""
    single = ordinary(gradient, direction) and compiled(step)
    form = torch.ops.proto_reg.attach.default if single else attach_plain
    return form(gradient, direction, step)


def typical_sums(x: Tensor, index: Tensor, counted: Tensor | None, prototypes: Tensor, std: float = 1.0) -> Tensor:
    """:func:`typical_sums_plain`, compiled where it can be."""
    form = torch.ops.proto_reg.typical_sums.default if compiled(x, prototypes) else typical_sums_plain
    return form(x, index, counted, prototypes, std)


def tally(
    counts: Tensor,
    totals: Tensor,
    x: Tensor,
    scores: Tensor,
    prototypes: Tensor,
    counted: Tensor | None,
    prototype_loss: Tensor,
    mmd_loss: Tensor,
) -> None:
    """:func:`tally_plain` as an operator, for torch.compile must not undo what it wrote; compiled where it can be."""
    single = compiled(x, scores, prototypes) and totals.dtype == prototype_loss.dtype == mmd_loss.dtype == torch.float32
    operator = torch.ops.proto_reg.tally_float32 if single else torch.ops.proto_reg.tally
    operator.default(counts, totals, x, scores, prototypes, counted, prototype_loss, mmd_loss)


_DEFINITIONS: dict[str, Callable[..., object]] = {
    "unit_rows(Tensor x) -> (Tensor unit, Tensor inverse_norms)": unit_rows_plain,
    "unit_rows_pull_back(Tensor gradient, Tensor unit, Tensor inverse_norms) -> Tensor": unit_rows_pull_back_plain,
    "balance(Tensor a, Tensor b, float weight_a, float weight_b) -> (Tensor direction, Tensor scale)": balance_plain,
    "attach(Tensor gradient, Tensor direction, Tensor step) -> (Tensor by_z, Tensor by_parameter)": attach_plain,
    "typical_sums(Tensor x, Tensor index, Tensor? counted, Tensor prototypes, float std) -> Tensor": typical_sums_plain,
}
for _signature, _function in _DEFINITIONS.items():
    _name, _, _rest = _signature.partition("(")
    torch.library.define(f"proto_reg::{_name}", f"({_rest}")
    torch.library.impl(f"proto_reg::{_name}", "CompositeExplicitAutograd")(_function)
    torch.library.register_fake(f"proto_reg::{_name}")(_function)

_TALLY = (
    "(Tensor(a!) counts, Tensor(b!) totals, Tensor x, Tensor scores, Tensor prototypes, Tensor? counted, "
    "Tensor prototype_loss, Tensor mmd_loss) -> ()"
)
for _name in ("tally", "tally_float32"):  # only the second has a compiled kernel
    torch.library.define(f"proto_reg::{_name}", _TALLY)
    torch.library.impl(f"proto_reg::{_name}", "CompositeExplicitAutograd")(tally_plain)
    torch.library.register_fake(f"proto_reg::{_name}")(lambda *arguments: None)
