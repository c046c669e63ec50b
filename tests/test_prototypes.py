"""The cross-entropy of eq. 10 and its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import cosines

from proto_reg.functional import prototype_cross_entropy, sinkhorn
from proto_reg.functional.prototypes import prototype_cross_entropy_and_gradient


@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient(masked: bool) -> None:
    scores = cosines(40, 6, torch.float64).requires_grad_()
    codes = sinkhorn(scores)
    mask = torch.rand(40) > 0.3 if masked else None
    kept = slice(None) if mask is None else mask
    loss = prototype_cross_entropy(scores, codes, 0.2, mask=mask)
    torch.testing.assert_close(loss, F.cross_entropy(scores[kept] / 0.2, codes[kept]))
    (expected,) = torch.autograd.grad(loss, scores)
    value, gradient = prototype_cross_entropy_and_gradient(scores, codes, 0.2, mask=mask)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradient, expected)
    assert not gradient.requires_grad


def test_bad_arguments() -> None:
    scores = torch.randn(4, 3)
    with pytest.raises(ValueError, match="codes: expected 4 rows"):
        prototype_cross_entropy(scores, torch.rand(5, 3))
    with pytest.raises(ValueError, match="codes: expected 3 columns"):
        prototype_cross_entropy(scores, torch.rand(4, 2))
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
        prototype_cross_entropy(scores, torch.rand(4, 3), 0.0)
