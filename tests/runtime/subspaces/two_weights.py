"""A model of two weights and what it is trained on, for the tests of all rules."""

from __future__ import annotations

import torch


class Net(torch.nn.Module):
    """Two weights: 16 x 12 (more rows than columns) and 10 x 16 (fewer)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(12, 16, bias=False)
        self.down = torch.nn.Linear(16, 10, bias=False)
        self.double()

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def batch(step: int, scale: torch.Tensor | float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [60, 12], whose columns are scaled, and targets [60, 10]."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(60, 12, generator=generator, dtype=torch.float64) * scale
    return x, torch.randn(60, 10, generator=generator, dtype=torch.float64)


def loss_of(model, step: int, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    x, y = batch(step, scale)
    return (model(x) - y).square().mean()
