"""The processes that a component works with, and the collectives it needs. Without a group each is the identity.

The group is ``"default"`` (the default process group, if it is initialised and has several processes), None (this
process alone) or a ``torch.distributed.ProcessGroup``. Modules work together in training mode and alone in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, Union, cast

import torch
import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = Union[str, "dist.ProcessGroup", None]

_one_process = False

# torch 2.13 renamed it, and the old name warns.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Ranks:
    """The processes that a module works with. Each call looks them up.

    Copies share a ProcessGroup. A pickle keeps ``"default"`` instead: a ProcessGroup means nothing to another run.
    """

    def __init__(self, group: Group) -> None:
        _check_group(group)
        self.group = group

    def __deepcopy__(self, memo: dict) -> Ranks:
        return self

    def __reduce__(self) -> tuple:
        return Ranks, (None if self.group is None else "default",)

    def active(self, together: bool = True) -> dist.ProcessGroup | None:
        """The process group to work with now; None for this process alone, or if ``together`` is False."""
        together = together and self.group is not None and not _one_process and _initialized()
        return resolve(self.group) if together else None


def resolve(group: Group) -> dist.ProcessGroup | None:
    """``group`` as a ProcessGroup of more than one process, this one among them; None for this process alone.

    Raises:
        TypeError, ValueError: neither ``"default"`` nor None nor a ProcessGroup.
    """
    _check_group(group)
    if group is None or not _initialized():
        return None
    members: Any = dist.group.WORLD if isinstance(group, str) else group
    return members if dist.get_world_size(members) > 1 else None


@contextmanager
def one_process() -> Iterator[None]:
    """Inside this context modules work as if there were no other process, on a batch that was gathered before."""
    global _one_process
    before, _one_process = _one_process, True
    try:
        yield
    finally:
        _one_process = before


_AVAILABLE = dist.is_available()


def _initialized() -> bool:
    return _AVAILABLE and dist.is_initialized()


def _check_group(group: Group) -> None:
    if group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return
    if not isinstance(group, str):
        raise TypeError(
            f"group: expected 'default', None or a torch.distributed.ProcessGroup, got {type(group).__name__}. Of a "
            "DeviceMesh pass mesh.get_group()."
        )
    if group != "default":
        raise ValueError(f"group: expected 'default', None or a ProcessGroup, got {group!r}. Pass one of these.")


def size(group: dist.ProcessGroup | None) -> int:
    """Number of processes."""
    return 1 if group is None else dist.get_world_size(group)


def sum_(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``x`` summed over the ranks, in place."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def max_(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise maximum of ``x`` over the ranks, in place."""
    if group is not None:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def broadcast_(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Overwrite ``x`` with that of the group's first rank, in place."""
    if group is not None:
        dist.broadcast(x, src=dist.get_global_rank(group, 0), group=group)
    return x


def row_counts(count: int, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """``count`` of every rank. Reads them on the host.

    A group that reaches CPUs too (gloo, the default group) exchanges them there, and the ``device`` goes on working.
    """
    if group is None:
        return [count]
    where = "cpu" if "cpu" in dist.get_backend_config(group) else device
    counts = torch.empty(size(group), dtype=torch.int64, device=where)
    _all_gather(counts, torch.tensor([count], dtype=torch.int64, device=where), group=group)
    return counts.tolist()


def rows_before(counts: Sequence[int], group: dist.ProcessGroup | None) -> int:
    """The number of rows on the ranks before this one. ``counts``: rows of each rank."""
    return 0 if group is None else sum(counts[: dist.get_rank(group)])


def gather_rows(
    rows: Tensor, group: dist.ProcessGroup | None, counts: Sequence[int] | None = None
) -> tuple[Tensor, int]:
    """The rows of all ranks (N, ...) in their order, and the index of this rank's first row. No gradient.

    ``rows``: (n, ...), n may be 0. ``counts``: n of every rank, if it is known.
    """
    if counts is None:
        counts = row_counts(len(rows), group, rows.device)
    longest = max(counts)
    if group is None or longest == 0:
        return rows, 0
    start = rows_before(counts, group)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [part[:count] for part, count in zip(gather_equal(padded, group), counts, strict=True)]
    return torch.cat(parts), start


def gather_equal(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ``x`` (n, ...) of all ranks as (ranks, n, ...). All ranks have the same n."""
    everything = x.new_empty(size(group) * x.shape[0], *x.shape[1:])
    _all_gather(everything, x, group=group)
    return everything.unflatten(0, (size(group), x.shape[0]))


def local_part(whole: Tensor, sharded: Any) -> Tensor:
    """This rank's part of ``whole``, cut like the DTensor ``sharded``. No communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, sharded.placements).to_local()


def is_sharded(x: object) -> bool:
    """Whether ``x`` is a DTensor, as FSDP2's parameters are between passes. It does not import DTensor's module."""
    return isinstance(x, Tensor) and hasattr(x, "full_tensor")


def whole(x: Tensor) -> Tensor:
    """``x`` itself, or the whole of a DTensor. All ranks must call it."""
    return cast(Any, x).full_tensor() if is_sharded(x) else x


def with_gradients(value: Tensor, tensors: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """``value`` (), whose gradients by this rank's ``tensors`` are the known ``gradients``; first order only.

    Each rank's gradient is that of its own rows, times the number of ranks. DistributedDataParallel averages over the
    ranks, which gives the gradient of the value.
    """
    return _WithGradients.apply(value, *tensors, *gradients) if torch.is_grad_enabled() else value


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, *tensors_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors_and_gradients[len(tensors_and_gradients) // 2 :])
        return value.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_value: Tensor):
        gradients = ctx.saved_tensors
        return None, *(by_value * gradient for gradient in gradients), *([None] * len(gradients))
