"""Balanced assignment on hard scores that occur in training. A column is a kind of scores, a row is a method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from proto_reg._bench import cosine_scores, reference

ROWS, COLUMNS = 256, 30
BOUND, HALF_BOUND = 1e-3, 5e-3


def hazards() -> dict[str, list[Tensor]]:
    """Hard scores by the name of their difficulty. A method must be right on all scores of a column."""
    cosine = cosine_scores(ROWS, COLUMNS)
    generator = torch.Generator().manual_seed(1)
    dots = torch.randn(ROWS, 16, generator=generator) @ torch.randn(16, COLUMNS, generator=generator)
    column, row, nan, infinite = (cosine.clone() for _ in range(4))
    column[:, 3] = row[5] = -200
    nan[5, 3] = torch.nan
    infinite[:, 3] = -torch.inf
    wide = cosine * (0.9 / cosine.abs().max())
    return {
        "dots <= 300": [dots * (300 / dots.abs().max())],
        "cosine + 10": [cosine + 10],
        "a column at -200": [column],
        "a row at -200": [row],
        "fp16, cosine to .9": [wide.half()],
        "bf16": [wide.bfloat16()],
        "B = 1, K = 1": [normalize(cosine[:1], dim=1), cosine[:, :1].contiguous()],
        "one NaN": [nan],
        "a column at -inf": [infinite],
        "empty batch": [cosine[:0]],
    }


def verdict(method: Callable[[Tensor], object], cases: list[Tensor]) -> str:
    """``ok``, or the first fault in the codes of these scores."""
    for scores in cases:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                codes = method(scores)
            codes = codes if isinstance(codes, Tensor) else torch.from_dlpack(codes)
        except Exception as error:  # the table shows every error
            return f"raises {type(error).__name__}"
        found = _judge(scores, codes.double())
        if found != "ok":
            return found
    return "ok"


def _judge(scores: Tensor, codes: Tensor) -> str:
    if codes.shape != scores.shape:
        return f"shape {tuple(codes.shape)}"
    if len(scores) == 0:
        return "ok"
    lost = ~codes.isfinite().all(1)
    bad = scores.isnan().any(1)
    if bad.any():
        return "all NaN" if lost.all() else "ok" if torch.equal(lost, bad) else f"{int(lost.sum())} rows NaN"
    if lost.any():
        return "NaN"
    if (zero := int((codes.sum(1) < 0.5).sum())) > 0:
        return f"{zero} rows 0" if zero > 1 else "row 0"
    # A prototype that no row may have gets nothing. The others share the rows as if it did not exist.
    alive = scores.double().amax(0) > -torch.inf
    expected = torch.zeros_like(codes)
    expected[:, alive] = reference(scores[:, alive])
    error = max((codes - expected).abs().max().item(), (codes.sum(1) - 1).abs().max().item())
    return "ok" if error <= (BOUND if scores.dtype == torch.float32 else HALF_BOUND) else f"{error:.0e}"


def robustness(
    methods: Mapping[str, Callable[[Tensor], object]], device: torch.device
) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table, computed on ``device``."""
    cases = {name: [scores.to(device) for scores in hard] for name, hard in hazards().items()}
    rows = [[name, *(verdict(method, scores) for scores in cases.values())] for name, method in methods.items()]
    return ["", *cases], rows
