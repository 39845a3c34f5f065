"""A small model, batches of it, and the comparison with the same model in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oasis_fx import LowRankGrad, oasis_backend
from oasis_fx.graph.matricization import as_rows


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(torch.nn.Module):
    """Two blocks, four weights, float64."""

    def __init__(self, around: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.around = around
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.around is None else self.around(block, x)
        return x


def batch(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (5, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def backward(function: Callable[..., torch.Tensor], *inputs: Any) -> None:
    function(*inputs).square().sum().backward()


def compile_eager(function: Any, **options: Any) -> Any:
    """Compiled by the backend at rank 3, without code generation; the backend is its attribute."""
    backend = oasis_backend(rank=3, inner="aot_eager")
    compiled = torch.compile(function, backend=backend, **options)
    return SimpleNamespace(run=compiled, backend=backend)


def count_low_rank(model: torch.nn.Module, reference: torch.nn.Module) -> int:
    """Compare each gradient with the reference's, low-rank ones in their coordinates; return how many those are."""
    found = 0
    for (name, weight), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        gradient, dense = weight.grad, expected.grad
        if gradient is None or dense is None:
            assert gradient is dense, name
        elif isinstance(gradient, LowRankGrad) and gradient.basis is not None:
            found += 1
            projected = as_rows(dense, gradient.features) @ gradient.basis.detach()
            torch.testing.assert_close(gradient.factor, projected, rtol=1e-9, atol=1e-9, msg=name)
        else:
            dense_again = gradient.to_dense() if isinstance(gradient, LowRankGrad) else gradient
            torch.testing.assert_close(dense_again, dense, rtol=1e-9, atol=1e-9, msg=name)
    return found


def statistic_error(weight: torch.Tensor, x: torch.Tensor) -> float:
    """How far the statistic of a weight's subspace is from X^T X Q."""
    subspace = weight.grad.subspace
    return float((subspace.statistic - x.T @ (x @ subspace.basis.detach())).abs().max())


@pytest.fixture
def kit() -> SimpleNamespace:
    return SimpleNamespace(
        Block=Block, Net=Net, batch=batch, backward=backward, compile_eager=compile_eager,
        count_low_rank=count_low_rank, statistic_error=statistic_error,
    )  # fmt: skip
