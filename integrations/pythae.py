"""An autoencoder with prototypes in pythae's own form, and a sampler around them (extra ``pythae``).

model = PrototypicalAE(PrototypicalAEConfig(input_dim=(1, 28, 28), latent_dim=16, num_prototypes=30))
TrainingPipeline(model=model, training_config=BaseTrainerConfig(...))(train_data, eval_data)
images = PrototypeSampler(model, PrototypeSamplerConfig(prototype=3)).sample(8)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proto_reg import LatentNoise, PrototypeHead, PrototypeWarning, PrototypicalRegularizer, RegularizerOutput, Schedule

try:
    from pydantic.dataclasses import dataclass
    from pythae.models import AE, AEConfig, AutoModel
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.samplers import BaseSampler, BaseSamplerConfig
except ImportError as error:
    raise ImportError("proto_reg.integrations.pythae needs pythae. Run: pip install 'proto_reg[pythae]'") from error


@dataclass
class PrototypicalAEConfig(AEConfig):
    """Configuration of :class:`PrototypicalAE`.

    Args:
        input_dim: (C, H, W) of the data.
        latent_dim: D.
        num_prototypes: K.
        similarity: ``"cosine"``, ``"dot"`` or ``"euclidean"``, see :class:`proto_reg.PrototypeHead`.
        std, mode, prototype_weight, mmd_weight, schedule, follow_rate: see :class:`proto_reg.PrototypicalRegularizer`.
        noise, noise_steps: ``size`` and ``steps`` of a :class:`proto_reg.LatentNoise` before the decoder.
    """

    num_prototypes: int = 30
    similarity: str = "cosine"
    std: float | None = None
    mode: str = "balanced"
    prototype_weight: float = 0.03
    mmd_weight: float = 0.1
    schedule: Schedule = field(default_factory=Schedule)
    follow_rate: float = 0.02
    noise: float = 0.0
    noise_steps: int = 0


class PrototypicalAE(AE):
    """pythae's autoencoder with the prototypical layer between encoder and decoder.

    A forward pass counts as a training step if the model is in training mode and ``epoch`` is among the arguments.
    Pythae's trainers pass it. So the trainer's sanity check does not move the prototypes. Neither do ``reconstruct``,
    ``embed`` and ``interpolate`` of a model in training mode. Pass ``epoch`` in a loop of your own.

    A forward pass returns what ``AE`` returns; ``info`` has what the layer computed. ``AutoModel`` loads the model too,
    after an import of this module.

    Args:
        model_config, encoder, decoder: as pythae's ``AE`` takes them.

    Attributes:
        info: what the layer computed in the last forward pass, without gradients; None before the first. See
            :class:`proto_reg.RegularizerOutput`.

    Raises:
        TypeError, ValueError: an option of the layer out of its range.
    """

    def __init__(
        self,
        model_config: PrototypicalAEConfig,
        encoder: BaseEncoder | None = None,
        decoder: BaseDecoder | None = None,
    ) -> None:
        super().__init__(model_config, encoder=encoder, decoder=decoder)
        self.model_name = "PrototypicalAE"
        self.info: RegularizerOutput | None = None
        c = model_config
        self.regularizer = PrototypicalRegularizer(
            c.latent_dim,
            c.num_prototypes,
            head=PrototypeHead(c.latent_dim, c.num_prototypes, similarity=c.similarity, std=c.std),
            mode=c.mode,
            prototype_weight=c.prototype_weight,
            mmd_weight=c.mmd_weight,
            schedule=c.schedule,
            follow_rate=c.follow_rate,
        )
        self.noise = LatentNoise(c.noise, c.noise_steps)

    def forward(self, inputs: dict[str, Tensor], **kwargs: Any) -> ModelOutput:
        """Encode and decode ``inputs["data"]`` (B, *input_dim).

        Returns pythae's ModelOutput, as ``AE`` does: ``loss`` (), ``recon_x`` (B, *input_dim) and ``z`` (B, D).
        """
        x = inputs["data"]
        z = self.encoder(x).embedding
        self.regularizer.train(self.training and "epoch" in kwargs)
        if self.training and not self.regularizer.training and z.requires_grad:
            z.register_hook(_own_loop)
        z, info = self.regularizer(z)
        self.noise.train(self.regularizer.training)
        recon_x = self.decoder(self.noise(z))["reconstruction"]
        loss = self.loss_function(recon_x, x)
        if self.regularizer.mode == "weighted":
            loss = loss + info.loss
        self.info = RegularizerOutput(*(value.detach() for value in info))  # a graph would forbid copies
        return ModelOutput(loss=loss, recon_x=recon_x, z=z)

    if TYPE_CHECKING:  # torch's own returns Any

        def __call__(self, inputs: dict[str, Tensor], **kwargs: Any) -> ModelOutput: ...

    @classmethod
    def _load_model_config_from_folder(cls, dir_path: str) -> PrototypicalAEConfig:
        """Pythae's own method knows only its own configs."""
        return PrototypicalAEConfig.from_json_file(str(Path(dir_path, "model_config.json")))


def _knowing_ours(load: Callable) -> classmethod:
    """``load`` of AutoModel, extended to our config. AutoModel knows a model by the name of its config."""

    @wraps(load)
    def knowing(cls: type[AutoModel], path: str, *arguments: Any, **options: Any) -> Any:
        try:
            return load.__func__(cls, path, *arguments, **options)
        except NameError as error:
            if PrototypicalAEConfig.__name__ not in str(error):
                raise
        return getattr(PrototypicalAE, load.__name__)(path, *arguments, **options)

    return classmethod(knowing)


# pythae has no registry for models.
if not hasattr(AutoModel.load_from_folder, "__wrapped__"):
    AutoModel.load_from_folder = _knowing_ours(AutoModel.load_from_folder)
    AutoModel.load_from_hf_hub = _knowing_ours(AutoModel.load_from_hf_hub)


def _own_loop(gradient: Tensor) -> None:
    """Warn of a backward pass through a forward pass that did not count."""
    warnings.warn(
        "A backward pass went through PrototypicalAE without epoch= in its forward: the prototypes learn nothing. In a "
        "loop of your own call model(inputs, epoch=epoch).",
        PrototypeWarning,
        stacklevel=2,
    )


@dataclass
class PrototypeSamplerConfig(BaseSamplerConfig):
    """Configuration of :class:`PrototypeSampler`.

    Args:
        prototype: the prototype to sample around; None draws prototypes uniformly.
        std: standard deviation around it. None is what training aims at; 0 is the prototype itself.
    """

    prototype: int | None = None
    std: float | None = None


class PrototypeSampler(BaseSampler):
    """Samples from the prior of the training: normal distributions around the prototypes.

    It needs no ``fit``. Pythae's own samplers work too, but ``NormalSampler`` draws from another prior.

    Raises:
        TypeError, ValueError: the model is another one, or an option is out of its range.
    """

    def __init__(self, model: PrototypicalAE, sampler_config: PrototypeSamplerConfig | None = None) -> None:
        if not isinstance(model, PrototypicalAE):
            raise TypeError(f"model: expected a PrototypicalAE, got {type(model).__name__}. It has no prototypes.")
        super().__init__(model, PrototypeSamplerConfig() if sampler_config is None else sampler_config)
        if self.sampler_config.prototype is not None:
            model.regularizer.head.check_index(self.sampler_config.prototype)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        batch_size: int = 500,
        output_dir: str | None = None,
        return_gen: bool = True,
        save_sampler_config: bool = False,
    ) -> Tensor | None:
        """Images (num_samples, *input_dim), as pythae's samplers return them; PNG files in ``output_dir`` if given."""
        config = self.sampler_config
        z = self.model.regularizer.head.sample(num_samples, config.prototype, std=config.std)
        images = torch.cat([self.model.decoder(part)["reconstruction"] for part in z.split(batch_size)])
        if output_dir is not None:
            for i, image in enumerate(images):
                self.save_img(image, output_dir, f"{i:08d}.png")
        if save_sampler_config:
            self.save(output_dir)
        return images if return_gen else None
