"""A small AutoencoderKL with prototypes of whole pictures. It is trained on digits, saved, loaded and sampled.

python examples/diffusers_vae.py    # half a minute on a CPU core; needs proto_reg[diffusers,examples]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from image_data import load

import proto_reg
from proto_reg import plots
from proto_reg.integrations.diffusers import PrototypicalAutoencoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("diffusers_vae"), help="folder for the model and samples.png")
    args = parser.parse_args()
    torch.manual_seed(0)
    data = load()
    train, test = data.train.unflatten(1, data.shape), data.test.unflatten(1, data.shape)

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4, "sample_size": 8}
    vae = AutoencoderKL(in_channels=1, out_channels=1, mid_block_add_attention=False, **blocks, **sizes)
    model = PrototypicalAutoencoder(vae, num_prototypes=30, map_size=(4, 4))  # added; D = 4 * 4 * 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # was vae.parameters()
    for epoch in range(args.epochs):
        for x in train[torch.randperm(len(train))].split(48):
            loss = F.mse_loss(model(x).sample, x)  # was vae(x).sample, and a KL term
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: training MSE {loss.item():.4f}")

    model.save_pretrained(args.out)  # AutoencoderKL.from_pretrained also reads this folder
    model = PrototypicalAutoencoder.from_pretrained(args.out)
    head = model.regularizer.head
    with torch.no_grad():
        reconstruction, z, _ = model(test)
    metrics = proto_reg.functional.latent_metrics(z.flatten(1), head, data.test_labels)
    figures = f"purity {metrics['purity']:.2f}, r^2/D {metrics['r2_per_dim']:.2f}"
    print(f"test MSE {F.mse_loss(reconstruction, test):.4f}, {figures}")
    figure = plots.prototypes(lambda z: model.decode(z.unflatten(1, (4, 4, 4))).clamp(0, 1), head, blocks=3)
    figure.savefig(args.out / "samples.png")  # model.sample(8, prototype=3) gives images as a tensor


if __name__ == "__main__":
    main()
