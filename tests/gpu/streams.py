"""Calls on four streams, at the same time as other work, give the same results as single calls."""

import torch

from proto_reg import _bench
from proto_reg import functional as f

for shape in ((256, 30), (1024, 100), (4096, 300), (2048, 3000)):
    scores = _bench.cosine_scores(*shape, device="cuda")
    expected = f.sinkhorn(scores, 0.05, 3, backend="cuda")
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for i in range(200):
        with torch.cuda.stream(streams[i % 4]):
            if i % 16 == 5:
                torch.cuda._sleep(1_000_000)
            found.append(f.sinkhorn(scores, 0.05, 3, backend="cuda"))
    torch.cuda.synchronize()
    assert all(torch.equal(codes, expected) for codes in found), shape
    print(shape, "the same on every stream")
