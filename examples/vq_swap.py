"""VectorQuantize and VectorPrototypes in the same model. It encodes digits as 2 x 2 maps of latents.

A squared error leaves latents close together, so the prototypes use a sixth of the usual standard deviation. Needs
proto_reg[vq].
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from image_data import load
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from proto_reg.integrations.vq import VectorPrototypes


class Model(nn.Module):
    """An autoencoder with a quantiser, or a module with the same call, between encoder and decoder."""

    def __init__(self, vq: nn.Module, dim: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 64, 4, stride=4), nn.ReLU(), nn.Conv2d(64, dim, 1))
        self.vq = vq
        self.decoder = nn.Sequential(nn.Conv2d(dim, 64, 1), nn.ReLU(), nn.ConvTranspose2d(64, 1, 4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, indices, loss = self.vq(self.encoder(x))
        return self.decoder(z), indices, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    data = load()
    train, test = data.train.unflatten(1, data.shape), data.test.unflatten(1, data.shape)
    for kind, options in ((VectorQuantize, {}), (VectorPrototypes, {"std": 1 / 6})):
        torch.manual_seed(0)
        model = Model(kind(dim=16, codebook_size=32, accept_image_fmap=True, **options), dim=16)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(args.epochs):
            for x in train[torch.randperm(len(train))].split(48):
                reconstruction, _, vq_loss = model(x)
                loss = F.mse_loss(reconstruction, x) + vq_loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            reconstruction, indices, _ = model.eval()(test)
            hard = model.decoder(model.vq.get_codes_from_indices(indices))
        usage = torch.bincount(indices.flatten(), minlength=32) / indices.numel()
        mse = f"{F.mse_loss(reconstruction, test):.4f}, from indices alone {F.mse_loss(hard, test):.4f}"
        print(f"{kind.__name__}: test MSE {mse}, perplexity {torch.special.entr(usage).sum().exp():.1f} of 32")


if __name__ == "__main__":
    main()
