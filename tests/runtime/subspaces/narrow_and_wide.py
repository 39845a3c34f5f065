"""A model whose weights read few directions and many, and its training, for the tests of ranks that are shared out."""

from __future__ import annotations

import torch


class Net(torch.nn.Module):
    """What ``narrow`` reads has two directions; what ``wide`` reads has all of n."""

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow, self.wide = torch.nn.Linear(n, n), torch.nn.Linear(n, n // 2)

    def forward(self, x):
        n, out = self.wide.in_features, self.wide.out_features
        a = x[:, :2] @ torch.linspace(-1, 1, 2 * n, dtype=x.dtype).view(2, n)
        return self.wide(x) + self.narrow(a)[:, :out]


def loss_of(model, step: int, shape: tuple[int, int] = (96, 64)) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - x[:, : shape[1] // 2].sin()).square().mean()


def train(compiled, optimizer, steps, shape: tuple[int, int] = (96, 64)) -> list[float]:
    """Take a step for each number, and return the losses before them."""
    losses = []
    for step in steps:
        loss = loss_of(compiled, step, shape)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
