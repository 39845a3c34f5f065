"""Counted bytes and FLOPs against measured bytes and counts by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import oasis_backend
from oasis_fx.inspect.measure import saved_for_backward_bytes
from oasis_fx.inspect.report import report
from oasis_fx.inspect.tracing import trace_model
from oasis_fx.memory.node_costs import matmul_flops
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.settings import Settings
from tests.tiny_llama import VOCABULARY, llama

RANK = 2


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).view(2, 8, 4, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q)


class Chunked(torch.nn.Module):
    """`b` reads one half of what tanh keeps: its memory is that of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 64, bias=False), torch.nn.Linear(32, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, v = torch.tanh(self.a(x)).chunk(2, dim=-1)
        return self.b(v) + u[..., :8] * v[..., :8]


@pytest.mark.parametrize("model_class", [Attention, Chunked, llama], ids=lambda f: f.__name__)
def test_bytes_are_those_that_a_run_keeps(model_class) -> None:
    torch.manual_seed(0)
    shapes = {Attention: (2, 8, 16), Chunked: (10, 8)}
    x = torch.randint(VOCABULARY, (2, 10)) if model_class is llama else torch.randn(shapes[model_class])
    model = model_class()
    backend = oasis_backend(rank=RANK, inner="aot_eager")

    def measured(compiler) -> int:
        torch._dynamo.reset()
        out = torch.compile(model, backend=compiler)(x)
        bases = [s.basis for w in model.parameters() if (s := STORE.existing(w, SubspaceSpec(RANK)))]
        known = [x, *model.parameters(), *model.buffers(), *bases]
        return saved_for_backward_bytes(getattr(out, "logits", out), known)

    kept = measured(backend)
    (found,) = backend.report()
    assert found.totals is not None
    assert found.totals.saved_bytes_after == kept
    assert found.totals.saved_bytes_before == measured("aot_eager")


def test_attention_counts_on_a_cpu() -> None:
    (record,) = trace_model(Attention(), torch.randn(2, 8, 16), Settings(rank=RANK, inner="aot_eager"))
    assert record.trace is not None
    linear, projection = 2 * 16 * 16 * 16, 2 * (2 * 16 * 16 * RANK)  # P and C
    matmul = 2 * (2 * 4) * 8 * 8 * 4  # of Q K^T, and of A V: 2 x 4 heads of 8 x 4
    assert matmul_flops(record.trace.forward.graph) == linear + projection + 2 * matmul
    # The kernel recomputes Q K^T; then dA, dV, dQ, dK. Then G; nothing asks for dX.
    assert matmul_flops(record.trace.backward.graph) == 5 * matmul + 2 * 16 * 16 * RANK


def test_half_of_a_kept_tensor_is_kept_with_it() -> None:
    (found,) = report(trace_model(Chunked(), torch.randn(10, 8), Settings(rank=RANK, inner="aot_eager")))
    row = next(row for row in found.rows if row.name == "b.weight")
    whole = 4 * 10 * 64
    assert (row.saved_bytes_before, row.saved_bytes_after) == (whole, whole)
    assert "X also kept" in row.note
