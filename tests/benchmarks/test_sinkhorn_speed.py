"""The speed of Sinkhorn and of SwAV's algorithm: ``pytest tests/benchmarks -k sinkhorn --benchmark-enable``.

``python tests/benchmarks/sinkhorn_table.py`` makes the whole comparison, with all peers.
"""

from __future__ import annotations

from functools import partial

import pytest
import sinkhorn_race as race
import torch

from proto_reg import _bench
from proto_reg.functional import sinkhorn

SMALL = [(256, 10), (256, 30), (256, 50), (4096, 300)]
LARGE = [(2048, 3000), (8192, 3000)]
METHODS = ["SwAV", *_bench.usable_backends(torch.device("cpu"))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SMALL + LARGE, ids="{0[0]}x{0[1]}".format)
def test_codes(benchmark, shape: tuple[int, int], method: str) -> None:
    if shape in LARGE and not benchmark.enabled:
        pytest.skip("seconds: with --benchmark-enable")
    scores = _bench.cosine_scores(*shape)
    call = partial(race.swav, scores) if method == "SwAV" else partial(sinkhorn, scores, backend=method)
    assert race.largest_error(call(), _bench.reference(scores)) <= _bench.BOUND
    benchmark.group = f"{shape[0]} x {shape[1]}"
    benchmark(call)
