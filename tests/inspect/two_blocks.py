"""Two residual blocks and a head, for the tests that look at names and source lines."""

from __future__ import annotations

import torch


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(6, 8, bias=False)
        self.down = torch.nn.Linear(8, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.sin(self.up(x))
        return x + self.down(h)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.lm_head = torch.nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(torch.exp(x))


def build() -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the model and one batch."""
    torch.manual_seed(0)
    return Net().double(), torch.randn(50, 6, dtype=torch.float64)
