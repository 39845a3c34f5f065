"""The decisions of a report against what the two graphs hold."""

from __future__ import annotations

import math

import pytest
import torch

from oasis_fx import oasis_backend
from oasis_fx.inspect.decisions import BACKWARD, PROJECTED, RECOMPUTED, SAVED


class Net(torch.nn.Module):
    """`up` reads a sine, which nothing else of the backward pass does; `down` a tanh, which its own gradient reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
        self.down = torch.nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(torch.sin(self.first(x)))))


def decisions_of(**settings):
    torch._dynamo.reset()
    torch.manual_seed(0)
    backend = oasis_backend(rank=4, inner="aot_eager", **settings)
    torch.compile(Net(), backend=backend)(torch.randn(100, 32)).sum().backward()
    (found,) = backend.report()
    return found


def test_each_tensor_has_the_decision_that_the_graphs_show() -> None:
    report = decisions_of()
    found = {(one.module, one.operator, one.shape): one for one in report.decisions}
    sine = found["", "sin", (100, 64)]
    assert sine.decision == PROJECTED and sine.num_bytes == 100 * 64 * 4 and math.isnan(sine.price)
    tanh = found["", "tanh", (100, 64)]
    assert tanh.decision == SAVED and tanh.flops == 0 and tanh.price == tanh.num_bytes
    pre = found["first", "mm", (100, 64)]  # the gradient of the sine reads it
    assert pre.decision == SAVED and pre.flops == 2 * 100 * 32 * 64 and pre.price == pre.flops / 16
    of_tanh = [one for one in report.decisions if one.decision == BACKWARD]
    assert {one.shape for one in of_tanh if one.operator == "mm"} == {(100, 4), (64, 4)}
    saved = sum(one.num_bytes for one in report.decisions if one.decision == SAVED)
    assert saved == report.totals.saved_bytes_after


def test_what_the_graph_returns_is_not_projected() -> None:
    """The return statement reads G and C, and so depends on the bases; what else it reads is freed by nothing."""
    report = decisions_of()
    assert {one.operator for one in report.decisions if one.decision == PROJECTED} == {"sin"}
    assert not [one for one in report.decisions if one.module == "down"]


def test_a_budget_shows_in_the_decisions() -> None:
    report = decisions_of(memory_budget=0.3)
    again = [one for one in report.decisions if one.decision == RECOMPUTED]
    assert sum(one.flops for one in again) > 0
    flops = report.totals.matmul_flops_after - decisions_of().totals.matmul_flops_after
    assert flops == sum(one.flops for one in again)
    text = str(report)
    assert "recomputed" in text and "price: of recomputing it" in text


@pytest.mark.parametrize("budget", [0.0, 0.4, "20KB"])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_under_a_budget_dropout_is_the_same_in_both_passes(inner, budget) -> None:
    """The gradient of a mean of ``dropout(x) * w`` by ``w`` is what the forward pass let through."""

    class Dropped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(64, 32, bias=False)

        def forward(self, x):
            dropped = torch.nn.functional.dropout(torch.tanh(self.a(x)), 0.5)
            return self.b(dropped), dropped

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Dropped().train(), torch.randn(200, 32)
    backend = oasis_backend(rank=4, inner=inner, memory_budget=budget)
    y, dropped = torch.compile(model, backend=backend)(x)
    seen = dropped.detach().clone()
    y.sum().backward()
    gradient = model.b.weight.grad
    expected = torch.ones(32, 200) @ seen @ gradient.basis.detach()
    torch.testing.assert_close(gradient.factor, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_regions_keep_their_word_under_a_budget(dropout) -> None:
    class Regions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(64, 32, bias=False)

        def region(self, x):
            return torch.nn.functional.dropout(torch.tanh(self.a(x)), dropout)

        def forward(self, x):
            return self.b(torch.utils.checkpoint.checkpoint(self.region, x, use_reentrant=False))

    gradients = []
    for budget in (1.0, 0.5):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Regions().train()
        backend = oasis_backend(rank=4, inner="aot_eager", memory_budget=budget)
        compiled = torch.compile(model, backend=backend)
        torch.manual_seed(1)
        compiled(torch.randn(100, 32)).square().sum().backward()
        gradients.append([p.grad.factor for p in model.parameters()])
        (report,) = backend.report()
        tanh = [one for one in report.decisions if one.operator == "tanh"]
        assert tanh and all(one.decision != SAVED for one in tanh)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
