"""Prototypes, the scores of latents against them, and the mixture of normals they define."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_floating, check_matrix, check_number, check_positive_int, compute_dtype, warn
from ._distributed import Group, broadcast_, gather_rows, is_sharded, local_part, resolve, whole
from .clusters import Clusters
from .functional.prototypes import SIMILARITIES, prototype_scores
from .kernels.scores import scores_and_pull_back
from .mixture import COVARIANCES, ClusterShapes, PrototypeMixture, kmeans, kmeans_plus_plus

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PrototypeHead(nn.Module):
    """K prototypes in a latent space of D dimensions, and the normal distribution N(v, std^2 I) around each.

    Args:
        latent_dim: D.
        num_prototypes: K. With K = 1 the prototype loss has no gradient: only the layer's follower moves the prototype.
        similarity: ``"cosine"`` (default), ``"dot"`` (paper, eq. 10) or ``"euclidean"``; see
            :func:`proto_reg.functional.prototype_scores`.
        std: standard deviation of the distribution around each prototype that training aims at. By default it begins
            with 1, and a layer's training lets it follow the scale of the latents; see docs/scale.md. It is part of the
            state: ``load_state_dict`` sets it, and warns if another one was given here.
        init_std: standard deviation of the initial coordinates. The default is std / 2: prototypes then lie .7 std
            sqrt(D) apart.
        covariance: of the normal distribution that samples around a prototype are drawn from. ``"low_rank"`` (default):
            ``rank`` leading directions and a diagonal. ``"full"``, ``"diagonal"``. These are learned from the latents;
            ``"isotropic"`` is std^2 I and learns nothing.
        rank: number of leading directions, at most D / 2. With 8 instead of 16 samples of MNIST and Fashion-MNIST had
            less variety, with 32 more errors.

    Attributes:
        prototypes: Parameter (K, D), the points themselves: ``decoder(head.prototypes)`` shows them.
        std: float, see above.
        follows_scale: bool, whether training may change ``std``: True if none was given.

    Raises:
        TypeError, ValueError: an argument out of its range, named.
    """

    _std_given = follows_scale = False  # in heads that were pickled without them
    clusters: Clusters | None
    _drawn: Tensor | None = None  # the first prototypes; None in heads that were pickled without
    shards: Any = None  # the DTensor that the prototypes are gathered from, while FSDP2 has them gathered

    def __init__(
        self,
        latent_dim: int,
        num_prototypes: int,
        *,
        similarity: str = "cosine",
        std: float | None = None,
        init_std: float | None = None,
        covariance: str = "low_rank",
        rank: int = 16,
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.num_prototypes = check_positive_int("num_prototypes", num_prototypes)
        self.similarity = check_choice("similarity", similarity, SIMILARITIES)
        self.std = 1.0 if std is None else check_number("std", std, above=0)
        self._std_given, self.follows_scale = std is not None, std is None
        self.init_std = None if init_std is None else check_number("init_std", init_std, above=0)
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, latent_dim))
        # None is registered too: a state with shapes loads into a head without.
        shaped = check_choice("covariance", covariance, COVARIANCES) != "isotropic"
        self.register_module("clusters", Clusters(latent_dim, covariance, rank) if shaped else None)
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
        """Draw the prototypes anew from N(0, init_std^2 I), and forget the shapes of their clusters."""
        if self.clusters is not None:
            self.clusters.reset_parameters()
        nn.init.normal_(self.to_write_to(), std=self.std / 2 if self.init_std is None else self.init_std)
        self._drawn = self.prototypes.detach().clone()

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
        alone = list(self._parameters) == ["prototypes"] and list(self._modules) == ["clusters"]
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
    def fit(
        self, z: Tensor | Iterable[Tensor], generator: torch.Generator | None = None, *, group: Group = "default"
    ) -> None:
        """Learn the shape of each prototype's cluster from latents ``z``: (N, D), or batches of them.

        After training with the layer it is not needed: shapes then come from the last latents of training. More latents
        give better samples, and those of other encoders are known only to you. Any encoder will do, trained with our
        layer or not. Prototypes that are still where they were drawn first go to the centres of k-means.

        A latent belongs to the prototype with its highest score. The weight of a prototype is the share of its latents,
        the centre their mean. The covariance is of the kind that the head was built with; a small cluster borrows from
        the covariance of all clusters. All of it is part of ``state_dict``. After more training the shapes come from
        the last latents again, as soon as these are as many as ``z`` or fill their ring.

        Args:
            generator: of the start of k-means.
            group: a ProcessGroup, or ``"default"``: the latents of all its ranks. All must call; N may differ and be 0.

        Raises:
            TypeError, ValueError: no latents, another D, latents that are not finite, or ``covariance="isotropic"``.
        """
        if self.clusters is None:
            raise ValueError(
                "fit: expected a head with covariance='low_rank', 'full' or 'diagonal', got 'isotropic', which has no "
                "shape to learn. Build the head with one of them."
            )
        ranks = resolve(group)
        z = self._latents_of_all(z if isinstance(z, Tensor) else self._joined(z), ranks)
        if len(z) == 0:
            raise ValueError("z: expected latents in one process of the group at least, got none. Encode some data.")
        if self._as_drawn() and len(z) >= self.num_prototypes:
            self.place(slice(None), broadcast_(kmeans(z, self.num_prototypes, generator), ranks))
        prototypes = whole(self.prototypes.detach())
        self.clusters.fit(z, self._scores(z), prototypes, compute_dtype(prototypes.dtype))

    def _joined(self, batches: Iterable[Tensor]) -> Tensor:
        """The rows of all ``batches`` (n, D). TypeError or ValueError for one that is no such matrix."""
        return torch.cat([check_matrix("z", part, self.latent_dim, axes="(N, D)", empty=True) for part in batches])

    def _as_drawn(self) -> bool:
        """Whether the prototypes are still where :meth:`reset_parameters` drew them."""
        now, drawn = whole(self.prototypes.detach()), self._drawn
        return drawn is not None and torch.equal(now, drawn.to(now))

    @property
    def shapes(self) -> ClusterShapes | None:
        """The newest shapes: of :meth:`fit`, or of the last latents of training. None if there are none yet."""
        if self.clusters is None:
            return None
        prototypes = whole(self.prototypes.detach())
        with torch.no_grad():
            return self.clusters.shapes(prototypes, self._scores, compute_dtype(prototypes.dtype))

    def _scores(self, z: Tensor) -> Tensor:
        """:meth:`forward`, also between FSDP2's passes, when the head holds shards."""
        if is_sharded(self.prototypes):
            return prototype_scores(z, whole(self.prototypes.detach()), self.similarity, std=self.std)
        return self(z)

    def mixture(self, std: float | None = None, *, spread: float = 1.0) -> PrototypeMixture:
        """The prior as a distribution: ``sample``, ``log_prob``, ``responsibilities``.

        It has the weights, centres and covariances of :attr:`shapes`. If there are none, or if ``std`` is given, it is
        sum_k N(v_k, std^2 I) / K; None is the head's. ``spread`` multiplies every standard deviation.
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

        A draw has the shape of the prototype's cluster; see :attr:`shapes`. If there is none yet, or if ``std`` is
        given, it is from N(v, std^2 I); None is the head's std, which training aims at, and 0 gives the prototype
        itself. ``spread`` multiplies the standard deviation in all directions: .7 gives more typical samples, 1 has the
        variety of the data. Raises TypeError or ValueError for an argument out of its range.
        """
        check_positive_int("num_samples", num_samples)
        device, shapes = self.prototypes.device, self.shapes if std is None else None
        if prototype is not None:
            index = torch.full((num_samples,), self.check_index(prototype), dtype=torch.int64, device=device)
        elif shapes is not None:
            index = torch.multinomial(shapes.weights, num_samples, replacement=True, generator=generator)
        else:
            index = torch.randint(self.num_prototypes, (num_samples,), device=device, generator=generator)
        return self._draw(index, shapes, std, spread, generator)

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
        return self._draw(index, self.shapes if std is None else None, std, spread, generator)

    def _draw(
        self,
        index: Tensor,
        shapes: ClusterShapes | None,
        std: float | None,
        spread: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        """A draw (n, D) of ``shapes``, or of N(v, std^2 I) without them, around each of the prototypes ``index``."""
        check_number("spread", spread, at_least=0)
        v = self.prototypes[index]
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
