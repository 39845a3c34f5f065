"""A small network, and what it is compared by."""

from __future__ import annotations

import torch

from oasis_fx import LowRankGrad
from oasis_fx.graph.matricization import as_rows

EAGER = {"inner": "aot_eager"}


def net(n: int = 12, m: int = 20, out: int = 7) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(n, m), torch.nn.Tanh(), torch.nn.Linear(m, out)).double()


def batch(seed: int = 0, n: int = 12) -> torch.Tensor:
    return torch.randn(9, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_exact(model: torch.nn.Module, reference: torch.nn.Module, rewritten: set[str] | None) -> None:
    """Each gradient is dW @ Q where rewritten and dW elsewhere."""
    found = set()
    for (name, weight), (_, dense) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if isinstance(weight.grad, LowRankGrad):
            found.add(name.removesuffix(".weight"))
            expected = as_rows(dense.grad, weight.grad.features) @ weight.grad.basis.detach()
            torch.testing.assert_close(weight.grad.factor, expected, rtol=1e-10, atol=1e-10, msg=name)
        elif dense.grad is None:
            assert weight.grad is None, name
        else:
            torch.testing.assert_close(weight.grad, dense.grad, rtol=1e-12, atol=1e-12, msg=name)
    assert rewritten is None or found == rewritten


def backward(function, *inputs) -> None:
    function(*inputs).square().sum().backward()
