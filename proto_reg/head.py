"""Prototypes, the scores of latents against them, and the mixture of normals they define."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ._checks import check_choice, check_floating, check_matrix, check_number, check_positive_int, compute_dtype, warn
from ._distributed import Group, broadcast_, gather_rows, is_sharded, local_part, resolve, whole
from .functional.prototypes import SIMILARITIES, prototype_scores
from .kernels.scores import scores_and_pull_back


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
        """Draw the prototypes anew from N(0, init_std^2 I)."""
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
        check_matrix("z", z, self.latent_dim, axes="(N, D)", empty=ranks is not None)
        z, _ = gather_rows(z.to(self.prototypes.device), ranks)
        if len(z) < self.num_prototypes:
            raise ValueError(
                f"z: expected at least {self.num_prototypes} latents, one for each prototype, got {len(z)}. "
                "Encode more of the data."
            )
        if not bool(z.isfinite().all()):
            raise ValueError("z: expected finite latents, got NaN or infinity. Look for the overflow upstream.")
        chosen = z[kmeans_plus_plus(z, self.num_prototypes, generator)]
        chosen = broadcast_(chosen, ranks)
        self.place(slice(None), chosen)

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

    def mixture(self, std: float | None = None) -> PrototypeMixture:
        """The prior sum_k N(v_k, std^2 I) / K: ``sample``, ``log_prob``, ``responsibilities``. None: the head's std."""
        return PrototypeMixture(self.prototypes, self.std if std is None else std)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        prototype: int | None = None,
        *,
        std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw latents (num_samples, D) around one prototype. None draws prototypes uniformly.

        ``std`` is the standard deviation around the prototype. None takes the head's, which training aims at; 0 gives
        the prototype itself. Raises TypeError or ValueError for an argument out of its range.
        """
        check_positive_int("num_samples", num_samples)
        device = self.prototypes.device
        if prototype is None:
            index = torch.randint(self.num_prototypes, (num_samples,), device=device, generator=generator)
        else:
            index = torch.full((num_samples,), self.check_index(prototype), dtype=torch.int64, device=device)
        return self.around(index, std, generator)

    @torch.no_grad()
    def around(self, index: Tensor, std: float | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draw a latent (n, D) around each of the prototypes ``index`` (n,) int64; ``std`` as in :meth:`sample`."""
        std = self.std if std is None else check_number("std", std, at_least=0)
        v = self.prototypes[index]
        return v + std * torch.randn(v.shape, dtype=v.dtype, device=v.device, generator=generator)

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


class PrototypeMixture(MixtureSameFamily):
    """sum_k N(v_k, std^2 I) / K as a ``torch.distributions`` object.

    ``-log_prob(z)`` is an out-of-distribution score. ``responsibilities(z)`` (..., K) is the posterior over prototypes.
    """

    def __init__(self, prototypes: Tensor, std: float = 1.0) -> None:
        self.std = check_number("std", std, above=0)
        weights = prototypes.new_ones(len(prototypes))
        super().__init__(Categorical(weights), Independent(Normal(prototypes, self.std), 1))

    def log_prob(self, value: Tensor) -> Tensor:
        """log sum_k N(value; v_k, std^2 I) / K, (...,) for ``value`` (..., D)."""
        return self._joint(value).logsumexp(-1)

    def responsibilities(self, value: Tensor) -> Tensor:
        """Posterior probability (..., K) of each prototype given ``value`` (..., D)."""
        return self._joint(value).softmax(-1)

    def _joint(self, value: Tensor) -> Tensor:
        """log of weight times density, (..., K), without the (..., K, D) tensor of the general mixture."""
        mean = self.component_distribution.mean
        check_floating("value", value)
        if value.ndim == 0 or value.shape[-1] != mean.shape[-1]:
            raise ValueError(
                f"value: expected shape (..., {mean.shape[-1]}), got {tuple(value.shape)}. Put the latent axis last."
            )
        dtype = compute_dtype(torch.promote_types(value.dtype, mean.dtype))
        mean, flat = mean.to(dtype), value.reshape(-1, mean.shape[-1]).to(dtype)
        # By differences: the product form is not exact in float32 far from the origin.
        distance = torch.cdist(flat, mean, compute_mode="donot_use_mm_for_euclid_dist")
        log_density = self.component_distribution.log_prob(mean)  # at distance 0, the normalising constant
        joint = log_density + self.mixture_distribution.logits - 0.5 * (distance / self.std).square()
        return joint.reshape(*value.shape[:-1], len(mean))


def kmeans_plus_plus(z: Tensor, count: int, generator: torch.Generator | None, centres: Tensor | None = None) -> Tensor:
    """Indices (count,) of rows of ``z`` (N, D), by k-means++.

    A row's probability is proportional to its squared distance from the nearest row that was drawn before, or from the
    nearest of ``centres`` (M, D).
    """
    # Only ratios of distances matter. At unit size no distance overflows, in any dtype.
    z = z.to(compute_dtype(z.dtype))
    there = z[:0] if centres is None else centres.to(z.dtype)
    top = torch.cat([z, there]).abs().amax().clamp_min(torch.finfo(z.dtype).tiny)
    z, there, chosen = z / top, there / top, []
    if len(there) == 0:
        chosen.append(torch.randint(len(z), (1,), device=z.device, generator=generator))
        there = z[chosen[0]]
    squared = torch.full_like(z[:, 0], torch.inf)
    for centre in there:
        squared = torch.minimum(squared, (z - centre).square().sum(1))
    while len(chosen) < count:
        # All latents on chosen points already: any row is as good as another.
        weight = squared + (squared.sum() == 0)
        chosen.append(torch.multinomial(weight, 1, generator=generator))
        squared = torch.minimum(squared, (z - z[chosen[-1]]).square().sum(1))
    return torch.cat(chosen)
