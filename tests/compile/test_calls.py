"""Calls that differ from the first: other sizes, parts not reached, regions, no gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import LowRankGrad, oasis_backend

from .small import EAGER, assert_exact, backward, batch, net


@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_sizes_may_change(dynamic) -> None:
    model = net()
    reference = copy.deepcopy(model)
    backend = oasis_backend(rank=3, **EAGER)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for size in (9, 5, 7, 11):
        x = torch.randn(size, 12, dtype=torch.float64)
        model.zero_grad(), reference.zero_grad()
        backward(compiled, x), backward(reference, x)
        assert_exact(model, reference, {"0", "2"})
    assert len(backend.compiled_graphs()) == (1 if dynamic else 2)
    for record in backend.compiled_graphs():
        assert len(record.retrace().sites) == 2


def test_parameters_not_reached_have_no_gradient() -> None:
    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = (torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))

        def forward(self, x):
            return self.used(x), self.unused(x)

    model, x = Branches(), torch.randn(4, 6, dtype=torch.float64)
    out, _ = torch.compile(model, backend=oasis_backend(rank=2, **EAGER))(x)
    out.square().sum().backward()
    assert isinstance(model.used.weight.grad, LowRankGrad)
    # A compiled graph gives a zero gradient to what its other output reads; stock torch.compile does too.
    stock = copy.deepcopy(model)
    stock.zero_grad()
    torch.compile(stock, backend="aot_eager")(x)[0].square().sum().backward()
    if stock.unused.weight.grad is None:
        assert model.unused.weight.grad is None
    else:
        assert model.unused.weight.grad.norm() == 0 == stock.unused.weight.grad.norm()


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_nested_compile_region_is_right_rewritten_or_not(inner) -> None:
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))
    head = torch.nn.Linear(8, 4, dtype=torch.float64)

    @torch.compiler.nested_compile_region
    def region(x, weight, bias):
        return torch.tanh(F.linear(x, weight, bias))

    def function(x):
        for layer in layers:
            x = region(x, layer.weight, layer.bias)
        return head(x)

    model = torch.nn.ModuleList([*layers, head])
    reference, x = copy.deepcopy(model), torch.randn(5, 8, dtype=torch.float64)
    reference[2](torch.tanh(reference[1](torch.tanh(reference[0](x))))).square().sum().backward()
    backward(torch.compile(function, backend=oasis_backend(rank=2, inner=inner)), x)
    assert_exact(model, reference, None)  # torch may inline the region or partition it by itself
    assert isinstance(head.weight.grad, LowRankGrad)


def test_a_graph_whose_outputs_need_no_gradients_is_reported_as_that() -> None:
    model = net()
    backend = oasis_backend(rank=3, **EAGER)
    found = torch.compile(lambda x: model(x).argmax(-1), backend=backend)(batch())
    assert torch.equal(found, model(batch()).argmax(-1))
    (report,) = backend.report()
    assert {row.reason for row in report.skipped} == {"nothing that the graph returns needs gradients"}
    assert backend.graphs() == []
