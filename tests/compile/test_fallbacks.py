"""Where a graph, or a torch, is not understood: dense gradients, right ones, and a reason."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import OasisWarning, oasis_backend

from .small import EAGER, assert_exact, backward, batch, net


def test_unsupported_graphs_keep_right_dense_gradients() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.plain, self.computed, self.mutated = (torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
            self.custom = torch.nn.Linear(6, 6, dtype=torch.float64)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            x = self.plain(x)
            x = x + F.linear(x, self.computed.weight.tanh())
            h = self.mutated(x)
            h.mul_(2.0)
            return torch.ops.oasis_fx_test.times(h, self.custom.weight)

    model, x = Odd(), torch.randn(4, 6, dtype=torch.float64)
    reference = copy.deepcopy(model)
    backward(reference, x)
    backend = oasis_backend(rank=2, **EAGER)
    backward(torch.compile(model, backend=backend, fullgraph=True), x)
    assert_exact(model, reference, {"plain", "mutated"})
    assert model.calls == 1
    (record,) = backend.compiled_graphs()
    reasons = {record.names[index]: why for index, why in record.reasons.items()}
    why = "no matmul of this graph reads it directly, only"
    assert reasons == {"computed.weight": f"{why} tanh", "custom.weight": f"{why} times"}


@torch.library.custom_op("oasis_fx_test::times", mutates_args=())
def times(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.T


@times.register_fake
def _(x, w):
    return x.new_empty(x.shape[0], w.shape[0])


times.register_autograd(
    lambda ctx, dy: (dy @ ctx.saved_tensors[1], dy.T @ ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def stays_dense(warning: str) -> None:
    model, x = net(), batch()
    reference = copy.deepcopy(model)
    backward(reference, x)
    with pytest.warns(OasisWarning, match=warning):
        backward(torch.compile(model, backend=oasis_backend(rank=3, **EAGER)), x)
    assert_exact(model, reference, set())


def test_a_torch_without_the_private_names_is_plain_inductor(monkeypatch) -> None:
    monkeypatch.delenv("OASIS_FX_RAISE")
    monkeypatch.setitem(sys.modules, "oasis_fx.compile.lowering", None)
    monkeypatch.delattr("oasis_fx.compile.lowering", raising=False)
    stays_dense("does not know this torch")
