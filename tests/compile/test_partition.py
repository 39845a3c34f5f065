"""A memory budget in bytes: kept, and used as far as torch's shares allow."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx import oasis_backend
from oasis_fx.compile.partitioner import JointPartitioner
from oasis_fx.graph.matricization import as_rows
from oasis_fx.inspect.measure import saved_for_backward_bytes
from oasis_fx.memory.sizes import parse_bytes
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.settings import Settings


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Block() for _ in range(4)), torch.nn.Linear(32, 3)).double()


X = torch.randn(100, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_sizes() -> None:
    assert parse_bytes("12GiB") == 12 * 2**30 and parse_bytes(" 1.5 MB ") == 1_500_000 and parse_bytes("7b") == 7
    assert [parse_bytes(text) for text in ("12", "GiB", "-1GiB", "1 2GiB", "12 parsecs", "")] == [None] * 6


@pytest.mark.parametrize("budget", ["12 parsecs", "much", "-3MiB", "", 1.5, -0.1, float("nan"), True])
def test_what_is_no_budget_is_refused(budget) -> None:
    with pytest.raises(ValueError, match=r"memory_budget is .*a number from 0 to 1, or a size such as '12GiB'"):
        oasis_backend(memory_budget=budget)


@pytest.mark.parametrize("exclude", [["no.such.*"], "*"], ids=["low-rank", "all weights left alone"])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_budgets_in_bytes_are_kept_and_gradients_are_right(inner, exclude) -> None:
    model = net()
    reference = copy.deepcopy(model)
    reference(X).square().sum().backward()
    known = [*model.parameters(), X]
    kept = {}
    budgets = (
        (1.0, "150KB", "60KB", "20KB", "0B") if inner == "aot_eager" else (1.0, "60KB")
    )  # generated code takes long
    for budget in budgets:
        torch._dynamo.reset()
        model.zero_grad()
        chosen = {} if exclude != "*" else {"exclude": "*"}
        backend = oasis_backend(rank=4, inner=inner, memory_budget=budget, **chosen)
        loss = torch.compile(model, backend=backend)(X).square().sum()
        bases = [row for s in backend._subspaces for row in (s.basis, s.energy)]
        size = saved_for_backward_bytes(loss, [*known, *bases])
        kept[budget] = size - 100 * 3 * 8  # the loss keeps its own input
        loss.backward()
        for weight, dense in zip(model.parameters(), reference.parameters(), strict=True):
            gradient, expected = weight.grad, dense.grad
            if isinstance(gradient, LowRankGrad):
                gradient, expected = gradient.factor, as_rows(expected, gradient.features) @ gradient.basis.detach()
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
        assert isinstance(model[0].up.weight.grad, LowRankGrad) == (exclude != "*")
    for budget, size in kept.items():
        if isinstance(budget, str):
            assert size <= parse_bytes(budget), kept
    sizes = list(kept.values())
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= len(budgets) - 2
    assert kept["60KB"] > 20_000  # what the budget allows is used


def test_a_budget_is_part_of_the_cache_key() -> None:
    keys = {JointPartitioner((), Settings(memory_budget=b).budget).uuid() for b in ("1GiB", "2GiB", 1.0)}
    assert len(keys) == 3
