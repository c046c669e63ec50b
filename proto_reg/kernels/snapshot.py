"""``proto_reg::snapshot``: the present value of a buffer, for graphs that overwrite the buffer later.

torch.compile keeps the buffer itself for the backward pass. There it recomputes cheap operations from the buffer's
later value. It keeps what an operator like this one returned.
"""

from __future__ import annotations

import torch
from torch import Tensor


def snapshot(value: Tensor) -> Tensor:
    """``value``; while a graph is traced, a copy that the backward pass finds unchanged."""
    return torch.ops.proto_reg.snapshot(value) if torch.compiler.is_compiling() else value


def _copy(value: Tensor) -> Tensor:
    """A copy of ``value``. RuntimeError in a backward pass: a graph that runs again would read a changed buffer."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "PrototypicalRegularizer: expected a compiled layer to run once, got a second run in a backward pass, from "
            "torch.utils.checkpoint. It would compute something else than the first. Checkpoint the encoder without "
            "the layer, or do not compile the layer."
        )
    return value.clone()


torch.library.define("proto_reg::snapshot", "(Tensor value) -> Tensor")
torch.library.impl("proto_reg::snapshot", "CompositeExplicitAutograd")(_copy)
torch.library.register_fake("proto_reg::snapshot", torch.empty_like)
