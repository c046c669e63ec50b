"""The model in pythae's form, with pythae's own trainer, files and samplers."""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from pythae.data.datasets import BaseDataset, DatasetOutput
from pythae.models import AE, Adversarial_AE, Adversarial_AE_Config, AEConfig, AutoModel, BaseAE
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.pipelines import TrainingPipeline
from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig, NormalSampler
from pythae.trainers import (
    AdversarialTrainer,
    AdversarialTrainerConfig,
    BaseTrainer,
    BaseTrainerConfig,
    CoupledOptimizerTrainer,
    CoupledOptimizerTrainerConfig,
)
from sklearn.datasets import load_digits
from test_examples import run
from torch import Tensor, nn

from proto_reg import PrototypeWarning, Schedule, attach
from proto_reg.integrations.pythae import PrototypeSampler, PrototypeSamplerConfig, PrototypicalAE, PrototypicalAEConfig


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.from_numpy(load_digits().images / 16).float().unsqueeze(1)  # (1797, 1, 8, 8)


def small(**options) -> PrototypicalAE:
    return PrototypicalAE(PrototypicalAEConfig(input_dim=(1, 8, 8), latent_dim=8, num_prototypes=6, **options))


def training(folder: Path, **options) -> BaseTrainerConfig:
    options = {"num_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 64} | options
    return BaseTrainerConfig(output_dir=str(folder), no_cuda=True, **options)


@pytest.fixture(scope="module")
def trained(digits: Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[PrototypicalAE, BaseTrainer]:
    """A model after two epochs of pythae's pipeline, and the pipeline's trainer."""
    torch.manual_seed(0)
    model = small()
    pipeline = TrainingPipeline(model=model, training_config=training(tmp_path_factory.mktemp("out")))
    pipeline(train_data=digits[:1536], eval_data=digits[1536:])
    return model, pipeline.trainer


def test_two_epochs_are_two_epochs_of_steps_and_the_loss_falls(digits: Tensor, trained) -> None:
    model, trainer = trained
    assert model.regularizer.steps == 2 * len(trainer.train_loader)  # the sanity check and eval do not count
    test = {"data": digits[1536:]}
    with torch.no_grad():
        assert model.eval()(test).loss < 0.5 * small().eval()(test).loss


def test_the_sanity_check_teaches_nothing(digits: Tensor, tmp_path: Path) -> None:
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    BaseTrainer(model, BaseDataset(digits[:128], torch.ones(128)), training_config=training(tmp_path))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_best_model_is_a_copy_of_its_own(trained) -> None:
    model, trainer = trained
    best = trainer._best_model
    assert best is not model
    assert best.regularizer.head.prototypes.data_ptr() != model.regularizer.head.prototypes.data_ptr()
    assert best.regularizer.steps == model.regularizer.steps  # the second epoch was better


def test_reloaded_reconstructs_the_same_bits(digits: Tensor, trained) -> None:
    _, trainer = trained
    best = trainer._best_model.eval()
    loaded = PrototypicalAE.load_from_folder(str(Path(trainer.training_dir, "final_model"))).eval()
    assert loaded.model_config == best.model_config
    assert isinstance(loaded.model_config, PrototypicalAEConfig)
    assert torch.equal(loaded.reconstruct(digits[:50]), best.reconstruct(digits[:50]))
    assert torch.equal(loaded.embed(digits[:50]), best.embed(digits[:50]))
    for key, value in best.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_options_survive_the_folder(tmp_path: Path) -> None:
    schedule = Schedule(warmup_steps=7, mmd_steps=3, mmd_weight=0.6, temperature=(0.3, 0.2), temperature_steps=4)
    options = {"mode": "weighted", "prototype_weight": 0.3, "mmd_weight": 0.4}
    small(similarity="euclidean", schedule=schedule, follow_rate=0.0, noise=0.2, noise_steps=5, **options).save(
        str(tmp_path)
    )
    model = PrototypicalAE.load_from_folder(str(tmp_path))
    layer = model.regularizer
    assert layer.head.similarity == "euclidean"
    assert layer.follower.rate == 0.0
    assert (model.noise.size, model.noise.steps) == (0.2, 5)
    assert replace(layer.schedule, temperature=tuple(layer.schedule.temperature)) == schedule
    for name, value in options.items():
        assert getattr(layer, name) == value


class Encoder(BaseEncoder):
    """A user's own network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> ModelOutput:
        return ModelOutput(embedding=self.net(x))


class VariationalEncoder(Encoder):
    """An encoder that also returns a log variance, as the variational models require."""

    def forward(self, x: Tensor) -> ModelOutput:
        z = self.net(x)
        return ModelOutput(embedding=z, log_covariance=torch.zeros_like(z))


class Decoder(BaseDecoder):
    """A user's own network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Unflatten(1, (1, 8, 8)))

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.net(z))


def test_without_weights_it_is_pythaes_autoencoder_to_the_bit(digits: Tensor) -> None:
    x, gradients = DatasetOutput(data=digits[:32]), []
    ours = PrototypicalAEConfig(input_dim=(1, 8, 8), latent_dim=8, prototype_weight=0.0, mmd_weight=0.0)
    for model_class, config in ((AE, AEConfig(input_dim=(1, 8, 8), latent_dim=8)), (PrototypicalAE, ours)):
        torch.manual_seed(0)
        model = model_class(config, encoder=Encoder(), decoder=Decoder())
        model(x, epoch=1).loss.backward()
        gradients.append([p.grad for part in (model.encoder, model.decoder) for p in part.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_networks_of_ones_own_come_back_with_the_model(digits: Tensor, tmp_path: Path) -> None:
    config = PrototypicalAEConfig(input_dim=(1, 8, 8), latent_dim=8)
    model = PrototypicalAE(config, encoder=Encoder(), decoder=Decoder()).eval()
    model.save(str(tmp_path))
    loaded = PrototypicalAE.load_from_folder(str(tmp_path)).eval()
    assert torch.equal(loaded.reconstruct(digits[:9]), model.reconstruct(digits[:9]))


def test_inference_in_training_mode_counts_nothing(digits: Tensor) -> None:
    model = small().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.reconstruct(digits[:16])
    model.embed(digits[:16])
    model.interpolate(digits[:4], digits[4:8], 3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model.training


def test_a_loop_of_ones_own_passes_the_epoch(digits: Tensor) -> None:
    model, inputs = small(), DatasetOutput(data=digits[:64])
    with pytest.warns(PrototypeWarning, match=r"call model\(inputs, epoch=epoch\)"):
        model(inputs).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs, epoch=1).loss.backward()
    assert model.regularizer.steps == 1


def test_weighted_mode_adds_its_loss(digits: Tensor) -> None:
    model = small(mode="weighted", prototype_weight=2.0, mmd_weight=3.0)
    out = model(DatasetOutput(data=digits[:64]), epoch=1)
    error = (out.recon_x - digits[:64]).square().sum() / 64
    torch.testing.assert_close(out.loss, error + 2 * model.info.prototype_loss + 3 * model.info.mmd_loss)
    balanced = small()(DatasetOutput(data=digits[:64]), epoch=1)
    torch.testing.assert_close(balanced.loss, (balanced.recon_x - digits[:64]).square().sum() / 64)


def test_output_is_aes_and_info_has_the_rest(digits: Tensor) -> None:
    model, x = small(), DatasetOutput(data=digits[:32])
    assert list(model(x, epoch=1).keys()) == list(AE(AEConfig(input_dim=(1, 8, 8), latent_dim=8))(x).keys())
    assert model.info.assignments.shape == (32,)
    assert not any(value.requires_grad for value in model.info)
    copy.deepcopy(model)


def test_automodel_knows_it_and_its_own(digits: Tensor, tmp_path: Path) -> None:
    plain = AEConfig(input_dim=(1, 8, 8), latent_dim=8)
    for model in (small().eval(), AE(plain).eval()):
        folder = str(tmp_path / model.model_name)
        model.save(folder)
        loaded = AutoModel.load_from_folder(folder).eval()
        assert type(loaded) is type(model)
        assert torch.equal(loaded.reconstruct(digits[:9]), model.reconstruct(digits[:9]))
    (tmp_path / "AE" / "model_config.json").write_text('{"name": "NoConfig"}')
    with pytest.raises(NameError, match="Got NoConfig"):
        AutoModel.load_from_folder(str(tmp_path / "AE"))


class Both(BaseAE):
    """A model whose trainer builds one optimizer for the encoder and one for the decoder."""

    def __init__(self, config: AEConfig) -> None:
        super().__init__(config)
        self.model_name = "Both"
        self.set_encoder(Encoder())
        self.set_decoder(Decoder())

    def forward(self, inputs: DatasetOutput, **kwargs) -> ModelOutput:
        z = self.encoder(inputs["data"]).embedding
        recon_x = self.decoder(z).reconstruction
        error = (recon_x - inputs["data"]).square().sum((1, 2, 3)).mean()
        return ModelOutput(
            loss=error,
            encoder_loss=error,
            decoder_loss=error,
            recon_x=recon_x,
            z=z,
            update_encoder=True,
            update_decoder=True,
        )


def test_prototypes_move_where_optimizers_are_of_encoder_and_decoder(digits: Tensor, tmp_path: Path) -> None:
    adversarial = Adversarial_AE_Config(input_dim=(1, 8, 8), latent_dim=8)
    sizes = {"output_dir": str(tmp_path), "num_epochs": 1, "no_cuda": True, "per_device_train_batch_size": 64}
    data = BaseDataset(digits[:256], torch.ones(256))
    for model, trainer, config in (
        (Both(AEConfig(input_dim=(1, 8, 8), latent_dim=8)), CoupledOptimizerTrainer, CoupledOptimizerTrainerConfig),
        (Adversarial_AE(adversarial, encoder=VariationalEncoder()), AdversarialTrainer, AdversarialTrainerConfig),
    ):
        layer = attach(model, "encoder", 8, 6, select="embedding").layer
        before = layer.head.prototypes.detach().clone()
        trainer(model, data, training_config=config(**sizes)).train()
        assert layer.steps >= 4
        assert not torch.equal(layer.head.prototypes, before)


def test_samplers(digits: Tensor, trained, tmp_path: Path) -> None:
    model, _ = trained
    gmm = GaussianMixtureSampler(model, GaussianMixtureSamplerConfig(n_components=3))
    gmm.fit(digits[:300])
    for sampler in (gmm, NormalSampler(model), PrototypeSampler(model)):
        images = sampler.sample(num_samples=7, batch_size=3)
        assert images.shape == (7, 1, 8, 8)
        assert not images.requires_grad
    sampler = PrototypeSampler(model, PrototypeSamplerConfig(prototype=2, std=0.0))
    out = sampler.sample(3, batch_size=2, output_dir=str(tmp_path), return_gen=False, save_sampler_config=True)
    assert out is None
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"{i:08d}.png" for i in range(3)), "sampler_config.json"]
    assert PrototypeSamplerConfig.from_json_file(str(tmp_path / "sampler_config.json")) == sampler.sampler_config
    v = model.regularizer.head.prototypes.detach()[[2, 2, 2]]
    torch.testing.assert_close(sampler.sample(3), model.decoder(v).reconstruction.detach())


def test_samples_around_a_prototype_are_of_its_kind(trained) -> None:
    model, _ = trained
    torch.manual_seed(0)
    z = model.embed(PrototypeSampler(model, PrototypeSamplerConfig(prototype=4, std=0.1)).sample(50))
    assert (model.regularizer.head(z).argmax(1) == 4).float().mean() > 0.9


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="similarity: expected one of"):
        small(similarity="cos")
    with pytest.raises(ValueError, match="num_prototypes: expected"):
        PrototypicalAE(PrototypicalAEConfig(input_dim=(1, 8, 8), num_prototypes=0))
    with pytest.raises(TypeError, match="model: expected a PrototypicalAE, got AE"):
        PrototypeSampler(AE(AEConfig(input_dim=(1, 8, 8))))
    with pytest.raises(ValueError, match="prototype: expected an index in"):
        PrototypeSampler(small(), PrototypeSamplerConfig(prototype=6))
    with pytest.raises(ValueError, match="num_samples: expected"):
        PrototypeSampler(small()).sample(0)


def test_a_missing_framework_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pythae.models", None)
    monkeypatch.delitem(sys.modules, "proto_reg.integrations.pythae")
    with pytest.raises(ImportError, match="pip install 'proto_reg\\[pythae\\]'"):
        import_module("proto_reg.integrations.pythae")


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    out = run("pythae_model.py", "--epochs", "2", "--out", tmp_path, cwd=tmp_path)
    for name in ("PrototypeSampler", "PrototypeSampler, prototype 3", "GaussianMixtureSampler", "NormalSampler"):
        assert f"{name}: (8, 1, 8, 8)" in out
    assert (tmp_path / "samples.png").stat().st_size > 10_000
