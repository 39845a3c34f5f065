"""Convolutions over volumes: their gradients and statistics against explicit patches."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx import LowRankGrad, oasis_backend
from oasis_fx.graph.matricization import as_rows


def patches(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """[tokens, channels * kernel^3]."""
    for dim in (2, 3, 4):
        x = x.unfold(dim, kernel, stride)
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(0, 3).flatten(1)


@pytest.mark.parametrize("call", ["module", "functional"])
def test_a_convolution_over_a_volume(call) -> None:
    layer = torch.nn.Conv3d(3, 5, 2, stride=2, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    x = torch.randn(2, 3, 4, 4, 6, dtype=torch.float64)
    backend = oasis_backend(4, inner="aot_eager")
    run = layer if call == "module" else lambda x: torch.conv3d(x, layer.weight, layer.bias, stride=2)
    torch.compile(run, backend=backend)(x).sin().sum().backward()
    plain(x).sin().sum().backward()
    gradient = layer.weight.grad
    assert isinstance(gradient, LowRankGrad) and gradient.features == (1, 5)
    q = gradient.basis.detach()
    torch.testing.assert_close(gradient.factor, as_rows(plain.weight.grad, (1, 5)) @ q)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    rows = patches(x, 2, 2)
    torch.testing.assert_close(gradient.subspace.statistic, rows.T @ (rows @ q))
