"""Private: the operators behind ``proto_reg.functional``.

Each file registers one operator with ``torch.library`` (schema, fake, autograd) beside its plain-torch reference,
which is the implementation on every device until a compiled one is registered behind the same name.
"""

from __future__ import annotations

from . import backends, follow, mmd, sinkhorn

__all__ = ["backends", "follow", "mmd", "sinkhorn"]
