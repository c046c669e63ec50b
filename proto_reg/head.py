"""Prototypes, the scores of latents against them, and the mixture of normals they define."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_floating, check_matrix, check_number, check_positive_int, compute_dtype, warn
from ._distributed import Group, broadcast_, gather_rows, is_sharded, local_part, resolve, whole
from .functional.prototypes import SIMILARITIES, prototype_scores
from .kernels.scores import scores_and_pull_back
from .mixture import ClusterShapes, PrototypeMixture, fit_shapes, kmeans_plus_plus

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PrototypeHead(nn.Module):
    """K prototypes in a latent space of D dimensions, and the normal distribution N(v, std^2 I) around each.

    Args:
        latent_dim: D.
        num_prototypes: K. With K = 1 the prototype loss has no gradient: only the layer's follower moves the prototype.
        similarity: ``"cosine"`` (default), ``"dot"`` (paper, eq. 10) or ``"euclidean"``; see
            :func:`proto_reg.functional.prototype_scores`.
        std: standard deviation of the distribution around each prototype that training aims at, 1 by default.
            The reconstruction decides how far apart an encoder puts latents; docs/scale.md tells which std fits. It is
            part of the state: ``load_state_dict`` sets it, and warns if another one was given here.
        init_std: standard deviation of the initial coordinates. The default is std / 2: prototypes then lie .7 std
            sqrt(D) apart.

    Attributes:
        prototypes: Parameter (K, D), the points themselves: ``decoder(head.prototypes)`` shows them.
        std: float, see above.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """

    _std_given = False  # in heads that were pickled without it
    shards: Any = None  # the DTensor that the prototypes are gathered from, while FSDP2 has them gathered

    def __init__(
        self,
        latent_dim: int,
        num_prototypes: int,
        *,
        similarity: str = "cosine",
        std: float | None = None,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.num_prototypes = check_positive_int("num_prototypes", num_prototypes)
        self.similarity = check_choice("similarity", similarity, SIMILARITIES)
        self.std = 1.0 if std is None else check_number("std", std, above=0)
        self._std_given = std is not None
        self.init_std = None if init_std is None else check_number("init_std", init_std, above=0)
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, latent_dim))
        for name in ClusterShapes._fields:
            self.register_buffer(f"shape_{name}", None)
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        # During a pass FSDP2 replaces the shards by the gathered prototypes. Whoever moves these must move the shards
        # too: the optimizer holds the shards.
        if name == "prototypes":
            before = self.__dict__.get("_parameters", {}).get(name)
            self.__dict__["shards"] = before if is_sharded(before) and not is_sharded(value) else None
        super().__setattr__(name, value)

    def get_extra_state(self) -> Tensor:
        """() float32 ``std``. It is no buffer: other code would write to it, and conversions would round it."""
        return torch.tensor(self.std, dtype=torch.float32, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take over ``std``. The fewest digits that round to the stored number are taken.

        It replaces a std that was given to the constructor, so that a training goes on as it was; a warning says so.
        Raises ValueError unless it is finite and > 0.
        """
        stored = check_number("std", state.item(), above=0)

        def is_stored(std: float) -> bool:  # half precision was rounded from float32
            return torch.tensor(std, dtype=torch.float32, device="cpu").to(state.dtype).item() == stored

        if is_stored(self.std):
            return
        given, self.std = self.std, next(filter(is_stored, (float(f"{stored:.{digits}g}") for digits in range(1, 18))))
        if self._std_given:
            self._std_given = False
            warn(
                f"std: {given:g} was given, but the loaded state has {self.std:g}, which counts from now on. To keep "
                f"the given one, set head.std = {given:g} after loading."
            )

    def to_write_to(self) -> Tensor:
        """The parameter ``prototypes``. RuntimeError if it is computed from others: a write would be lost."""
        own = self._parameters.get("prototypes")
        if own is None or not own.is_leaf or getattr(own, "_fsdp_flattened", False):  # the last: FSDP1's flat parameter
            raise RuntimeError(
                "head.prototypes: expected a parameter that the layer can write to, got a tensor that is computed from "
                "others. A parametrization such as weight_norm, pruning, functional_call, DataParallel and "
                "FullyShardedDataParallel put one there, and what is written to it is lost. Build the layer with "
                "follow_rate=0, call init_from and revive before, or leave the prototypes out of it; of the last two "
                "use DistributedDataParallel and fully_shard."
            )
        return own

    def reset_parameters(self) -> None:
        """Draw the prototypes anew from N(0, init_std^2 I), and forget :meth:`fit`."""
        self._set_shapes(None)
        nn.init.normal_(self.to_write_to(), std=self.std / 2 if self.init_std is None else self.init_std)

    def forward(self, z: Tensor) -> Tensor:
        """Scores (..., K) of latents ``z`` (..., D). TypeError or ValueError for integer latents or another D."""
        check_floating("z", z)
        if z.ndim == 0 or z.shape[-1] != self.latent_dim:
            raise ValueError(
                f"z: expected shape (..., {self.latent_dim}), got {tuple(z.shape)}. Put the latent axis last, or build "
                "the head with the latent_dim of your encoder."
            )
        return prototype_scores(z, self.prototypes, self.similarity, std=self.std)

    if TYPE_CHECKING:  # torch's own returns Any

        def __call__(self, z: Tensor) -> Tensor: ...

    def in_closed_form(self) -> bool:
        """Whether scores and gradients are those of the formulas. A subclass may compute others."""
        alone = list(self._parameters) == ["prototypes"] and not self._modules
        return type(self).forward is PrototypeHead.forward and alone

    def scores_and_pull_back(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, list[Tensor]]]]:
        """Scores (N, K) of ``z`` (N, D), and a function from the gradient by them to those by z and the parameters.

        They are in closed form. A subclass that computes other scores or prototypes goes through ``torch.func.vjp``.
        """
        if self.in_closed_form():
            v = self.prototypes.detach().to(z.dtype)
            scores, to_both = scores_and_pull_back(z, v, self.similarity, self.std)

            def pull_back(by_scores: Tensor) -> tuple[Tensor, list[Tensor]]:
                by_z, by_prototypes = to_both(by_scores)
                return by_z, [by_prototypes]

            return scores, pull_back

        parameters = {name: p.detach() for name, p in self.named_parameters()}

        def call(parameters: dict[str, Tensor], z: Tensor) -> Tensor:
            return torch.func.functional_call(self, parameters, (z,))

        scores, vjp = cast("tuple[Tensor, Callable]", torch.func.vjp(call, parameters, z))

        def pull_back_through(by_scores: Tensor) -> tuple[Tensor, list[Tensor]]:
            by_parameters, by_z = vjp(by_scores)
            return by_z, list(by_parameters.values())

        return scores, pull_back_through

    @torch.no_grad()
    def init_from(self, z: Tensor, generator: torch.Generator | None = None, *, group: Group = "default") -> None:
        """Put the prototypes on K of the latents ``z`` (N, D), chosen by k-means++ (Arthur and Vassilvitskii, 2007).

        In a process group the first rank chooses among the latents of all, and all take its choice. All must call; N
        may differ and be 0. With ``group=None`` this process chooses alone.

        Raises:
            ValueError: fewer than K latents, another D, or latents that are not finite.
        """
        ranks = resolve(group)
        z = self._latents_of_all(z, ranks)
        if len(z) < self.num_prototypes:
            raise ValueError(
                f"z: expected at least {self.num_prototypes} latents, one for each prototype, got {len(z)}. "
                "Encode more of the data."
            )
        chosen = z[kmeans_plus_plus(z, self.num_prototypes, generator)]
        chosen = broadcast_(chosen, ranks)
        self.place(slice(None), chosen)

    def _latents_of_all(self, z: Tensor, ranks: ProcessGroup | None) -> Tensor:
        """The latents ``z`` (N, D) of all ranks, finite, on the device of the prototypes. ValueError otherwise."""
        check_matrix("z", z, self.latent_dim, axes="(N, D)", empty=ranks is not None)
        z, _ = gather_rows(z.to(self.prototypes.device), ranks)
        if not bool(z.isfinite().all()):
            raise ValueError("z: expected finite latents, got NaN or infinity. Look for the overflow upstream.")
        return z

    @torch.no_grad()
    def place(self, index: Tensor | slice, points: Tensor) -> None:
        """Put the prototypes ``index`` on ``points`` (n, D). Under FSDP2 this writes to this rank's shard."""
        prototypes = self.to_write_to()
        if is_sharded(prototypes):
            every = whole(prototypes)
            every[index] = points.to(every.dtype)
            cast(Any, prototypes).to_local().copy_(local_part(every, prototypes))
        else:
            prototypes[index] = points.to(prototypes.dtype)

    @torch.no_grad()
    def fit(self, z: Tensor, *, rank: int = 16, group: Group = "default") -> None:
        """Learn the shape of each prototype's cluster from latents ``z`` (N, D), after training or between epochs.

        From then on :meth:`sample`, :meth:`around` and :meth:`mixture` use a weight, a centre and a covariance for each
        prototype instead of N(v, std^2 I). A latent belongs to the prototype with its highest score. The weight is the
        share of the latents, the centre their mean. The covariance has ``rank`` leading directions and a diagonal
        remainder; a small cluster borrows from the covariance of all clusters. All of it is part of ``state_dict``.
        Fit again after more training: the latents have moved. It works for any encoder, trained with our layer or not.

        Args:
            rank: at most D - 1. 0 fits a diagonal covariance.
            group: a ProcessGroup, or ``"default"``: the latents of all its ranks. All must call; N may differ and be 0.

        Raises:
            TypeError, ValueError: no latents, another D, latents that are not finite, or a rank below 0.
        """
        check_positive_int("rank", rank, minimum=0)
        z = self._latents_of_all(z, resolve(group))
        if len(z) == 0:
            raise ValueError("z: expected latents in one process of the group at least, got none. Encode some data.")
        prototypes = whole(self.prototypes.detach())
        # Between FSDP2's passes the head holds shards, with which it computes no scores.
        sharded = is_sharded(self.prototypes)
        scores = prototype_scores(z, prototypes, self.similarity, std=self.std) if sharded else self(z)
        self._set_shapes(fit_shapes(z, scores.argmax(1), prototypes, min(rank, self.latent_dim - 1)))

    @property
    def shapes(self) -> ClusterShapes | None:
        """What :meth:`fit` learned; None before."""
        found: list[Any] = [getattr(self, f"shape_{name}") for name in ClusterShapes._fields]
        return None if found[0] is None else ClusterShapes(*found)

    def _set_shapes(self, shapes: ClusterShapes | None) -> None:
        """Keep ``shapes`` on the device of the prototypes, in float32 or wider."""
        dtype = compute_dtype(self.prototypes.dtype)
        for name in ClusterShapes._fields:
            value = None if shapes is None else getattr(shapes, name).to(self.prototypes.device, dtype)
            setattr(self, f"shape_{name}", value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Make room for the shapes of the state, or have none if it has none."""
        saved: list[Any] = [state_dict.get(f"{prefix}shape_{name}") for name in ClusterShapes._fields]
        there = all(isinstance(value, Tensor) for value in saved)
        self._set_shapes(ClusterShapes(*map(torch.empty_like, saved)) if there else None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def mixture(self, std: float | None = None, *, spread: float = 1.0) -> PrototypeMixture:
        """The prior as a distribution: ``sample``, ``log_prob``, ``responsibilities``.

        It is sum_k N(v_k, std^2 I) / K before :meth:`fit`, and also if ``std`` is given; None is the head's. After it,
        it has the weights, centres and covariances of :meth:`fit`. ``spread`` multiplies every standard deviation.
        """
        check_number("spread", spread, above=0)
        shapes = self.shapes if std is None else None
        if shapes is not None:
            return PrototypeMixture(self.prototypes, shapes=shapes.scaled(spread))
        return PrototypeMixture(self.prototypes, (self.std if std is None else std) * spread)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        prototype: int | None = None,
        *,
        std: float | None = None,
        spread: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw latents (num_samples, D) around one prototype; None draws prototypes by the weights of the mixture.

        After :meth:`fit` a draw has the shape of the prototype's cluster. Before it, or if ``std`` is given, it is from
        N(v, std^2 I); None is the head's std, which training aims at, and 0 gives the prototype itself. ``spread``
        multiplies the standard deviation in all directions. Raises TypeError or ValueError for an argument out of its
        range.
        """
        check_positive_int("num_samples", num_samples)
        device, shapes = self.prototypes.device, self.shapes if std is None else None
        if prototype is not None:
            index = torch.full((num_samples,), self.check_index(prototype), dtype=torch.int64, device=device)
        elif shapes is not None:
            index = torch.multinomial(shapes.weights, num_samples, replacement=True, generator=generator)
        else:
            index = torch.randint(self.num_prototypes, (num_samples,), device=device, generator=generator)
        return self.around(index, std, generator, spread=spread)

    @torch.no_grad()
    def around(
        self,
        index: Tensor,
        std: float | None = None,
        generator: torch.Generator | None = None,
        *,
        spread: float = 1.0,
    ) -> Tensor:
        """Draw a latent (n, D) around each of the prototypes ``index`` (n,) int64; options as in :meth:`sample`."""
        check_number("spread", spread, at_least=0)
        v, shapes = self.prototypes[index], self.shapes if std is None else None
        if shapes is not None:
            return shapes.scaled(spread).draw(index, generator).to(v.dtype)
        std = self.std if std is None else check_number("std", std, at_least=0)
        return v + std * spread * torch.randn(v.shape, dtype=v.dtype, device=v.device, generator=generator)

    def check_index(self, prototype: int) -> int:
        """``prototype`` as an int in [0, K); TypeError or ValueError otherwise."""
        try:
            index = operator.index(prototype)
        except TypeError:
            raise TypeError(f"prototype: expected an int, got {type(prototype).__name__}. Pass one index.") from None
        if not 0 <= index < self.num_prototypes:
            raise ValueError(
                f"prototype: expected an index in [0, {self.num_prototypes}), got {index}. Choose one of the K."
            )
        return index

    def extra_repr(self) -> str:
        return f"{self.latent_dim}, {self.num_prototypes}, similarity={self.similarity!r}, std={self.std:g}"
