"""Prototypes in the latents of a diffusers autoencoder, saved in its folder (extra ``diffusers``).

model = PrototypicalAutoencoder(vae, num_prototypes=64)  # vae: AutoencoderKL, AutoencoderKLWan, AutoencoderTiny, ...
optimizer = torch.optim.AdamW(model.parameters())        # was vae.parameters()
loss = F.mse_loss(model(x).sample, x)                    # was vae(x).sample; no KL term, no sampling noise

model.save_pretrained(folder)                            # AutoencoderKL.from_pretrained(folder) still works
model = PrototypicalAutoencoder.from_pretrained(folder)
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from proto_reg import (
    AnchoredMMDLoss,
    LatentQueue,
    PrototypeHead,
    PrototypicalRegularizer,
    RegularizerOutput,
    Schedule,
    SinkhornAssigner,
)

try:
    import diffusers
    from safetensors.torch import load_file, save_file
except ImportError as error:
    raise ImportError(
        "proto_reg.integrations.diffusers needs diffusers. Run: pip install 'proto_reg[diffusers]'"
    ) from error

CONFIG, WEIGHTS = "prototypes.json", "prototypes.safetensors"
COMPONENTS = ("head", "assigner", "mmd", "queue")


class PrototypicalAutoencoderOutput(NamedTuple):
    """What a forward pass computed.

    Attributes:
        sample: (B, C, H, W) or (B, C, T, H, W) reconstructions, as in diffusers' ``DecoderOutput``.
        latents: what was decoded, in the shape of the latents that ``vae.encode(x)`` returns.
        info: what the layer computed, see :class:`proto_reg.RegularizerOutput`.
    """

    sample: Tensor
    latents: Tensor
    info: RegularizerOutput


class PrototypicalAutoencoder(nn.Module):
    """A diffusers autoencoder and the prototypes of its latents: ``model(x).sample`` instead of ``vae(x).sample``.

    The layer sits on the mode of the posterior; train without the KL term and without sampling noise. In autoencoders
    without a posterior, such as AutoencoderTiny and AutoencoderDC, it sits on the latents. VQModel is decoded without
    its quantiser: the codebook stays frozen, and ``VQModel.from_pretrained`` of the saved folder still quantises with
    it. Give this module to the optimizer and to DDP. You choose what a latent is:

    - By default **every position of the map** is a latent, and prototypes are typical positions (patches). ``sample``
      draws each position on its own: a texture, not a picture. ``sample_like`` redraws a real picture: it takes the
      prototype of each position from it.
    - With ``map_size`` **a whole map** is a latent: a prototype is a typical picture, and ``sample`` draws new pictures
      of its kind. Then all pictures must have one size, and latents of thousands of dimensions learn little.

    Latents and prototypes are those of ``vae.encode`` and ``vae.decode``. A diffusion model sees them scaled, by
    ``(z - shift_factor) * scaling_factor`` of ``vae.config``. After training set that factor to 1 over the standard
    deviation of the latents, as for any autoencoder.

    Args:
        vae: the autoencoder; ``vae.encode(x)`` has ``latent_dist``, ``latents`` or ``latent``, ``vae.decode(z)`` has
            ``sample``.
        num_prototypes: K.
        map_size: (h, w) or (t, h, w) of the latent maps, for prototypes of whole maps.
        layout: einops pattern of the latents: ``"b d h w"``, or ``"b d t h w"`` of video autoencoders. ``map_size``
            tells it too.
        latent_dim: channels of the latents; None takes ``vq_embed_dim``, ``latent_channels`` or ``z_dim`` from the
            autoencoder's config.
        options: of :class:`proto_reg.PrototypicalRegularizer`, such as ``mmd`` or ``schedule``.

    Raises:
        TypeError, ValueError: ``vae`` is no such autoencoder, or an option is out of its range.
    """

    def __init__(
        self,
        vae: nn.Module,
        num_prototypes: int,
        *,
        map_size: Sequence[int] | None = None,
        layout: str = "b d h w",
        latent_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not (isinstance(vae, nn.Module) and hasattr(vae, "encode") and hasattr(vae, "decode")):
            raise TypeError(f"vae: expected a diffusers autoencoder, got {type(vae).__name__}. Pass an AutoencoderKL.")
        channels = _latent_channels(vae) if latent_dim is None else latent_dim
        self.map_size = None if map_size is None else torch.Size(map_size)
        size = channels if self.map_size is None else channels * self.map_size.numel()
        inner = layout if self.map_size is None else "b d"
        self.regularizer = PrototypicalRegularizer(size, num_prototypes, layout=inner, **options)
        self.vae: Any = vae
        if isinstance(vae, diffusers.VQModel):  # without a gradient: DDP would complain of it
            vae.quantize.requires_grad_(False)
        self._components = [name for name in COMPONENTS if options.pop(name, None) is not None]
        if options.get("schedule") is not None:
            options["schedule"] = asdict(options["schedule"])
        sizes = {"latent_dim": channels, "map_size": None if map_size is None else list(map_size), "layout": layout}
        self._config = {"num_prototypes": num_prototypes, **sizes, **options}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> PrototypicalAutoencoderOutput:
        """Reconstruct ``x`` (B, C, H, W) or (B, C, T, H, W); ``mask`` as in :meth:`encode`."""
        z, info = self.encode(x, mask)
        return PrototypicalAutoencoderOutput(self.decode(z), z, info)

    if TYPE_CHECKING:  # torch's own returns Any

        def __call__(self, x: Tensor, mask: Tensor | None = None) -> PrototypicalAutoencoderOutput: ...

    def encode(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, RegularizerOutput]:
        """Latents of ``x``, regularised, and what the layer computed.

        ``mask``, the latents' shape without channels ((B,) with ``map_size``), is True where they count.

        Raises:
            TypeError, ValueError: an autoencoder without a posterior, or maps of another size than was declared.
        """
        output = self.vae.encode(x)
        posterior = getattr(output, "latent_dist", None)
        z = getattr(output, "latents", getattr(output, "latent", None)) if posterior is None else posterior.mode()
        if z is None:
            raise TypeError(
                f"vae: expected latent_dist, latents or latent in what {type(self.vae).__name__}.encode(x) returns, "
                f"got {type(output).__name__}. Call PrototypicalRegularizer on its latents instead."
            )
        if self.map_size is None:
            return self.regularizer(z, mask)
        if z.shape[2:] != self.map_size:
            raise ValueError(
                f"x: expected pictures whose latent maps are {tuple(self.map_size)}, got {tuple(z.shape[2:])} for "
                f"shape {tuple(x.shape)}. Set map_size= to the maps of your pictures, all of one size."
            )
        flat, info = self.regularizer(z.flatten(1), mask)
        return flat.unflatten(1, z.shape[1:]), info

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents ``z`` in the shape that :meth:`encode` returns, in any floating-point dtype."""
        vae, z = self.vae, z.to(self.vae.dtype)
        if isinstance(vae, diffusers.VQModel):
            return vae.decoder(vae.post_quant_conv(z), z if vae.config.norm_type == "spatial" else None)
        return vae.decode(z).sample

    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        prototype: int | None = None,
        *,
        size: Sequence[int] | None = None,
        std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Decoded latents (num_samples, C, H, W) around one prototype. None draws prototypes uniformly.

        Args:
            size: (h, w) or (t, h, w) of the latent maps. Each position is drawn on its own. Not with ``map_size``.
            std: standard deviation around the prototype. None is what training aims at; 0 is the prototype itself.

        Raises:
            TypeError, ValueError: an argument out of its range.
        """
        head = self.regularizer.head
        axes = len(self.regularizer.layout.axes) - 2
        if (size is None) != (axes == 0) or (size is not None and len(size) != axes):
            expected = f"{axes} numbers, the size of the latent maps" if axes else "None: map_size says it"
            cure = "Leave it out" if not axes else "Pass size=(h, w)" if axes == 2 else "Pass size=(t, h, w)"
            raise ValueError(f"size: expected {expected}, got {size}. {cure}.")
        shape = torch.Size((num_samples, *(size or ())))
        z = head.sample(shape.numel(), prototype, std=std, generator=generator)
        return self.decode(self._maps(z, shape))

    @torch.no_grad()
    def sample_like(
        self, assignments: Tensor, *, std: float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Decoded latents around the prototypes ``assignments``, for example ``info.assignments`` of real pictures.

        ``std=0`` decodes the prototypes alone, as a vector-quantised autoencoder would. Raises TypeError or ValueError
        if they are no indices, or not in the layout of the latents without channels.
        """
        head, axes = self.regularizer.head, len(self.regularizer.layout.axes) - 1
        if assignments.is_floating_point() or assignments.ndim != axes:
            raise ValueError(
                f"assignments: expected {axes} axes of indices, got {assignments.dtype} of shape "
                f"{tuple(assignments.shape)}. Pass info.assignments of an encoded batch."
            )
        for extreme in assignments.aminmax():
            head.check_index(int(extreme))
        return self.decode(self._maps(head.around(assignments.flatten(), std, generator), assignments.shape))

    def _maps(self, z: Tensor, shape: torch.Size) -> Tensor:
        """Rows ``z`` (N, D), one for each position of ``shape``, as latents that the vae decodes."""
        if self.map_size is not None:
            return z.unflatten(1, (-1, *self.map_size))
        layout = self.regularizer.layout
        return rearrange(z.unflatten(0, shape), f"{layout.positions} d -> {layout.pattern}").contiguous()

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write the autoencoder, as ``vae.save_pretrained(folder, **options)`` does, and the prototypes beside it.

        Raises:
            TypeError: an option of the layer that JSON cannot hold.
        """
        config = json.dumps({**self._config, "components": self._components}, indent=2)
        self.vae.save_pretrained(folder, **options)
        save_file({name: t.contiguous() for name, t in self.regularizer.state_dict().items()}, Path(folder, WEIGHTS))
        Path(folder, CONFIG).write_text(config + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        head: PrototypeHead | None = None,
        assigner: SinkhornAssigner | None = None,
        mmd: AnchoredMMDLoss | None = None,
        queue: LatentQueue | None = None,
        **options: Any,
    ) -> Self:
        """The autoencoder and its prototypes from a folder that :meth:`save_pretrained` wrote, in eval mode.

        Args:
            head, assigner, mmd, queue: components that were given to the constructor. Build them in the same way: the
                folder has their weights, and not their options.
            options: of the autoencoder's own ``from_pretrained``, such as ``torch_dtype``.

        Raises:
            FileNotFoundError: no prototypes in ``folder``.
            ValueError: a component that the saved model had is missing.
        """
        path = Path(folder, CONFIG)
        if not path.exists():
            raise FileNotFoundError(
                f"folder: expected {CONFIG} in {folder}, found none. For a plain autoencoder call "
                "PrototypicalAutoencoder(vae, num_prototypes); its save_pretrained writes the file."
            )
        config = json.loads(path.read_text())
        if config.get("schedule") is not None:
            config["schedule"] = Schedule(**config["schedule"])
        components: dict[str, Any] = {"head": head, "assigner": assigner, "mmd": mmd, "queue": queue}
        given = {name: component for name, component in components.items() if component is not None}
        if missing := set(config.pop("components")) - set(given):
            raise ValueError(
                f"{', '.join(sorted(missing))}: expected the component that the model was built with, got None. "
                "Pass one built in the same way; its weights are in the folder."
            )
        model = cls(diffusers.AutoModel.from_pretrained(os.fspath(folder), **options), **config, **given)
        model.regularizer.load_state_dict(load_file(Path(folder, WEIGHTS)))
        return model.eval()


def _latent_channels(vae: nn.Module) -> int:
    """Channels of the latents, as the config of ``vae`` has them; ValueError if it does not say."""
    config = getattr(vae, "config", {})
    for name in ("vq_embed_dim", "latent_channels", "z_dim"):
        if config.get(name) is not None:
            return config[name]
    raise ValueError(
        f"latent_dim: expected the channels of the latents, got None, and the config of {type(vae).__name__} names "
        "neither latent_channels nor z_dim. Pass the channels of what vae.encode(x) returns."
    )
