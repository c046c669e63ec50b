"""The cost of the layer in a training step: ``python tests/benchmarks/layer_cost.py [--processes 2]``.

A step is forward, backward and Adam. Three models take it without the layer, with it (balanced), and by Algorithm 1
(three isolated steps). The figures are medians over interleaved rounds, with one thread in each process.
``--processes 2`` trains under DistributedDataParallel over gloo, and each process has a batch of its own. Memory is the
largest sum of living tensors while a model is built and takes three steps: weights, activations, gradients and
optimizer states.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import sinkhorn_race as race
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import proto_reg
from proto_reg import _bench

WITHOUT, WITH, ALGORITHM = VARIANTS = ("without", "with the layer", "Algorithm 1")
BOUND = 1.10
MIB = 2**20


class Autoencoder(nn.Module):
    """An autoencoder, with or without the layer between its halves."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.decoder, self.regularizer = encoder, decoder, layer

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        if self.regularizer is not None:
            z, _ = self.regularizer(z)
        return self.decoder(z)


def quickstart() -> tuple[nn.Module, nn.Module]:
    """The autoencoder of examples/quickstart.py for the digits: 8x8 images, D = 32."""
    linear, relu = nn.Linear, nn.ReLU
    encoder = nn.Sequential(linear(64, 256), relu(), linear(256, 256), relu(), linear(256, 32))
    return encoder, nn.Sequential(linear(32, 256), relu(), linear(256, 256), relu(), linear(256, 64))


def convolutional(latent_dim: int = 256, maps: int = 256) -> tuple[nn.Module, nn.Module]:
    """The paper's model for MNIST (section 3.1): two blocks down to maps of 7x7, a dense layer, and the way back."""
    down = [nn.Conv2d(1, maps // 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(maps // 2, maps, 3, 2, 1), nn.ReLU()]
    up = [nn.ConvTranspose2d(maps, maps // 2, 4, 2, 1), nn.ReLU()]
    up += [nn.ConvTranspose2d(maps // 2, maps // 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(maps // 4, 1, 3, 1, 1)]
    encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(49 * maps, latent_dim))
    return encoder, nn.Sequential(nn.Linear(latent_dim, 49 * maps), nn.ReLU(), nn.Unflatten(1, (maps, 7, 7)), *up)


def autoencoder_kl() -> tuple[nn.Module, nn.Module]:
    """A small AutoencoderKL of diffusers for 32x32 images. Each position of its 4 x 8 x 8 maps is a latent."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )
    return nn.Sequential(vae.encoder, vae.quant_conv, Mode()), nn.Sequential(vae.post_quant_conv, vae.decoder)


class Mode(nn.Module):
    """The mean of the posterior in AutoencoderKL: the first half of the encoder's channels."""

    def forward(self, moments: Tensor) -> Tensor:
        return moments.chunk(2, dim=1)[0]


# Encoder and decoder, shape of a batch, latent dimension and layout. All models have K = 30.
MODELS = {
    "quickstart, 8x8": (quickstart, (48, 64), 32, "b d"),
    "the paper's, 28x28": (convolutional, (256, 1, 28, 28), 256, "b d"),
    "AutoencoderKL, 32x32": (autoencoder_kl, (32, 3, 32, 32), 4, "b d h w"),
}
PROTOTYPES = 30


def training_step(name: str, variant: str) -> Callable[[], object]:
    """A function that takes one step of a new model, always on the same batch. A process group trains together."""
    build, shape, latent_dim, layout = MODELS[name]
    torch.manual_seed(0)
    encoder, decoder = build()
    grouped = torch.distributed.is_initialized()
    x = torch.rand(shape, generator=torch.Generator().manual_seed(torch.distributed.get_rank() if grouped else 0))
    if variant == ALGORITHM:
        layer = proto_reg.PrototypicalRegularizer.paper(latent_dim, PROTOTYPES, layout=layout)
        training = proto_reg.PrototypicalTraining(encoder, decoder, layer, warmup_epochs=0)
        return lambda: training.step(x)
    layer = proto_reg.PrototypicalRegularizer(latent_dim, PROTOTYPES, layout=layout) if variant == WITH else None
    if layer is not None:
        layer.steps.fill_(layer.schedule.begin)  # the first steps compute only the MMD and cost less
    model: nn.Module = Autoencoder(encoder, decoder, layer)
    model = DistributedDataParallel(model) if grouped else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        loss = F.binary_cross_entropy_with_logits(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def seconds_per_step(name: str, seconds: float) -> list[float]:
    """The median seconds of a step for each variant. The rounds are interleaved and take about ``seconds`` in all."""
    steps = [training_step(name, variant) for variant in VARIANTS]
    for step in steps * 3:
        step()
    once = [_bench.clock(step, 3, torch.device("cpu")) for step in steps]
    # All processes must take the same number of steps.
    times = _of_the_first([max(1, round(0.02 / took)) for took in once])
    (rounds,) = _of_the_first([max(5, math.ceil(seconds / sum(map(math.prod, zip(once, times, strict=True)))))])
    samples = [
        [_bench.clock(step, count, torch.device("cpu")) for step, count in zip(steps, times, strict=True)]
        for _ in range(rounds)
    ]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def _of_the_first(numbers: list[int]) -> list[int]:
    """The first process's value, in all processes of the group. Without a group, the value itself."""
    shared = torch.tensor(numbers)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(shared, 0)
    return shared.tolist()


def peak_bytes(name: str, variant: str) -> int:
    """The largest sum of living tensors, from before the model is built to the end of its third step."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step = training_step(name, variant)
        for _ in range(3):
            step()
    memory = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes))


def measure(rank: int, processes: int, store: str, names: list[str], seconds: float, out: str) -> None:
    """Measure a row for each model. The first of the ``processes`` processes writes them."""
    torch.set_num_threads(1)
    if processes > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    race.keep_memory()
    rows = []
    for name in names:
        took, peak = seconds_per_step(name, seconds), [peak_bytes(name, variant) for variant in VARIANTS]
        ratios = [took[1] / took[0], took[2] / took[0], peak[1] / peak[0], peak[2] / peak[0]]
        met = "met" if ratios[0] <= BOUND else "MISSED"
        cells = [f"{took[0] * 1e3:.2f}", f"{took[1] * 1e3:.2f}", *(f"{ratio:.2f}" for ratio in ratios[:2])]
        cells += [f"{peak[0] / MIB:.1f}", *(f"{ratio:.2f}" for ratio in ratios[2:]), f"<= {BOUND:.2f} {met}"]
        rows.append([name, *cells])
    if rank == 0:
        Path(out).write_text(_bench.table(HEADER, rows))
    if processes > 1:
        torch.distributed.destroy_process_group()


HEADER = ["", "ms without", "ms with", "ratio", "Algorithm 1", "MiB without", "ratio", "Algorithm 1", "time"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="processes under DistributedDataParallel (default: 1)")
    parser.add_argument("--seconds", type=float, default=20.0, help="approximate time for each model (default: 20)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{_bench.environment(torch.device('cpu'))}, {arguments.processes} process(es), K = {PROTOTYPES}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/table"
        options = (arguments.processes, f"{folder}/store", arguments.models, arguments.seconds, out)
        mp.spawn(measure, options, nprocs=arguments.processes)
        print(Path(out).read_text())


if __name__ == "__main__":
    main()
