"""The host's time to enqueue a call, in microseconds, for plain torch and for the library."""

import time

import torch

from proto_reg import _bench
from proto_reg import functional as f

for shape in ((256, 30), (1024, 100), (4096, 300), (2048, 3000), (8192, 3000)):
    scores = _bench.cosine_scores(*shape, device="cuda")
    line = f"{shape}:"
    for backend in ("cuda", "torch"):
        for _ in range(20):
            f.sinkhorn(scores, 0.05, 3, backend=backend)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            f.sinkhorn(scores, 0.05, 3, backend=backend)
        took = time.perf_counter() - start
        torch.cuda.synchronize()
        line += f" {backend} {took / 100e-6:.1f} us"
    print(line)
