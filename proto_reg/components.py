"""The three components of a layer: given, or built here."""

from __future__ import annotations

from ._checks import check_instance, check_number
from ._distributed import Group
from .assigner import SinkhornAssigner
from .functional.problem import check_marginals
from .head import PrototypeHead
from .mmd import AnchoredMMDLoss


def components(
    latent_dim: int,
    num_prototypes: int,
    std: float | None,
    soft: bool,
    group: Group,
    head: PrototypeHead | None,
    assigner: SinkhornAssigner | None,
    mmd: AnchoredMMDLoss | None,
) -> tuple[PrototypeHead, SinkhornAssigner, AnchoredMMDLoss]:
    """Those that are given and the default ones for the others; see :class:`proto_reg.PrototypicalRegularizer`.

    Raises:
        TypeError, ValueError: components that are not ours, or do not fit together.
    """
    if head is None:
        head = PrototypeHead(latent_dim, num_prototypes, std=std)
    assigner = SinkhornAssigner(group=group) if assigner is None else assigner
    mmd = AnchoredMMDLoss(group=group) if mmd is None else mmd
    check_instance("head", head, PrototypeHead)
    check_instance("assigner", assigner, SinkhornAssigner)
    check_instance("mmd", mmd, AnchoredMMDLoss)
    if (head.latent_dim, head.num_prototypes) != (latent_dim, num_prototypes):
        raise ValueError(
            f"head: expected latent_dim={latent_dim} and num_prototypes={num_prototypes}, got "
            f"{head.latent_dim} and {head.num_prototypes}. Build both with the same sizes."
        )
    if std is not None and check_number("std", std, above=0) != head.std:
        raise ValueError(f"head: expected std={std}, got {head.std}. Give it to one of the two.")
    if assigner.marginals is not None:
        check_marginals(assigner.marginals, num_prototypes)
    if soft and (mmd.target == "sampled" or mmd.features is not None):
        which, cure = ("features=", "features=None") if mmd.features else ("a sampled target", "target='analytic'")
        raise ValueError(f"soft: expected False with {which}, got True. Use {cure} in mmd.")
    return head, assigner, mmd
