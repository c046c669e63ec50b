"""``proto_reg::snapshot``: the value that a buffer has now, for graphs that go on to overwrite it.

torch.compile keeps a buffer itself for the backward pass and recomputes what follows from it where that is cheap, from
the value it has by then. What an operator like this one returned is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def snapshot(value: Tensor) -> Tensor:
    """``value``; while a graph is traced, a copy that the backward pass finds as it is now."""
    return torch.ops.proto_reg.snapshot(value) if torch.compiler.is_compiling() else value


torch.library.define("proto_reg::snapshot", "(Tensor value) -> Tensor")
torch.library.impl("proto_reg::snapshot", "CompositeExplicitAutograd")(torch.clone)
torch.library.register_fake("proto_reg::snapshot", torch.empty_like)
