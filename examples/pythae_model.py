"""pythae's own pipeline and samplers for an autoencoder with prototypes. It is trained on digits, loaded and sampled.

python examples/pythae_model.py     # seconds on a CPU core; needs proto_reg[pythae,examples]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from image_data import load
from pythae.pipelines import TrainingPipeline
from pythae.samplers import GaussianMixtureSampler, NormalSampler
from pythae.trainers import BaseTrainerConfig

import proto_reg
from proto_reg import plots
from proto_reg.integrations.pythae import PrototypeSampler, PrototypeSamplerConfig, PrototypicalAE, PrototypicalAEConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("pythae_model"), help="folder for all output files")
    args = parser.parse_args()
    torch.manual_seed(0)
    data = load()
    train, test = data.train.unflatten(1, data.shape), data.test.unflatten(1, data.shape)

    # Was: model = AE(AEConfig(input_dim=data.shape, latent_dim=16))
    model = PrototypicalAE(PrototypicalAEConfig(input_dim=data.shape, latent_dim=16, num_prototypes=30, std=0.7))
    config = BaseTrainerConfig(
        output_dir=str(args.out), num_epochs=args.epochs, learning_rate=1e-3, per_device_train_batch_size=48
    )
    pipeline = TrainingPipeline(model=model, training_config=config)
    pipeline(train_data=train, eval_data=test)

    model = PrototypicalAE.load_from_folder(str(Path(pipeline.trainer.training_dir, "final_model"))).eval()
    with torch.no_grad():
        z, reconstruction = model.embed(test), model.reconstruct(test)
    head = model.regularizer.head
    metrics = proto_reg.functional.latent_metrics(z, head, data.test_labels)
    print(f"test MSE {F.mse_loss(reconstruction, test):.4f}, purity {metrics['purity']:.2f}")
    samplers = {
        "PrototypeSampler": PrototypeSampler(model),
        "PrototypeSampler, prototype 3": PrototypeSampler(model, PrototypeSamplerConfig(prototype=3)),
        "GaussianMixtureSampler": GaussianMixtureSampler(model),
        "NormalSampler": NormalSampler(model),
    }
    for name, sampler in samplers.items():
        sampler.fit(train)
        print(f"{name}: {tuple(sampler.sample(8).shape)}")
    figure = plots.prototypes(lambda z: model.decoder(z)["reconstruction"], head, blocks=3)
    figure.savefig(args.out / "samples.png")


if __name__ == "__main__":
    main()
