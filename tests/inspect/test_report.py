"""The report against counts by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import oasis_backend
from oasis_fx.inspect.measure import saved_for_backward_bytes
from oasis_fx.inspect.report_table import Table


class Net(torch.nn.Module):
    """up and gate read one activation, which is no input; down reads another; scale is no matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(64, 96, bias=False)
        self.down = torch.nn.Linear(96, 64, bias=False)
        self.frozen = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
        self.computed = torch.nn.Linear(64, 64, bias=False)

    def forward(self, x):
        h = torch.sin(self.frozen(x))
        return F.linear(self.down(torch.sigmoid(self.up(h)) * self.gate(h)), self.computed.weight.tanh())


@pytest.mark.parametrize("warm", [False, True])
def test_counts(warm) -> None:
    backend = oasis_backend(rank=8, inner="aot_eager")
    model, x = Net(), torch.randn(200, 64)
    loss = torch.compile(model, backend=backend)(x).sum()
    if warm:
        backend.compiled_graphs()[0].trace = None  # as after a hit of the compile cache
    (found,) = backend.report()
    up, gate, down = found.rows
    assert (up.name, up.shape, up.rank, up.shares_with) == ("up.weight", (96, 64), 8, ("gate.weight",))
    assert gate.shares_with == ("up.weight",) and down.shares_with == ()
    assert {(row.name, row.reason) for row in found.skipped} == {
        ("frozen.weight", "frozen"),
        ("computed.weight", "no matmul of this graph reads it directly, only tanh"),
    }
    # Bytes: the shared activation stands with the first weight. P is 200 x 8, C is 64 x 8 or 96 x 8, in float32.
    assert up.saved_bytes_before == 4 * 200 * 64 and gate.saved_bytes_before == gate.saved_bytes_after == 0
    assert up.saved_bytes_after == 4 * (200 * 8 + 64 * 8)
    assert down.saved_bytes_before == 4 * 200 * 96 and down.saved_bytes_after == 4 * (200 * 8 + 96 * 8)
    # FLOPs of a gradient: 2 N m n before; 2 N m r, and a share of 4 N n r, after.
    assert up.flops_before == 2 * 200 * 96 * 64
    assert up.flops_after == 2 * 200 * 96 * 8 + 4 * 200 * 64 * 8 / 2
    assert down.flops_after == 2 * 200 * 64 * 8 + 4 * 200 * 96 * 8
    totals = found.totals
    assert totals.gradient_bytes_before == 4 * 3 * 64 * 96
    assert totals.gradient_bytes_after == 4 * (8 * (96 + 96 + 64) + 8 * (64 + 96))
    assert totals.adam_bytes_after == 4 * (2 * 8 * (96 + 96 + 64) + 8 * (64 + 96))
    # What the report counts is what autograd keeps.
    bases = [s.basis for s in {p.grad.subspace for p in grads(model, loss)}]
    loss = torch.compile(model, backend=backend)(x).sum()
    known = [x, *model.parameters(), *bases]
    assert totals.saved_bytes_after == saved_for_backward_bytes(loss, known)
    text = str(found)
    for expected in ("up.weight", "96 x 64", "frozen", "no matmul of this graph", "saved for backward, MiB"):
        assert expected in text


def grads(model, loss):
    loss.backward()
    return [model.up.weight, model.gate.weight, model.down.weight]


def test_a_graph_without_weights_in_a_subspace() -> None:
    backend = oasis_backend(rank=8, inner="aot_eager", include="0.*", exclude="0.*")
    torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4)), backend=backend)(torch.randn(2, 4)).sum().backward()
    (found,) = backend.report()
    assert found.rows == () and found.totals is None and backend.graphs() == []
    assert "no weight of this graph" in str(found) and "excluded by '0.*'" in str(found)


def test_an_activation_that_is_kept_anyway_is_told() -> None:
    class Kept(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

        def forward(self, x):
            h = torch.sigmoid(self.first(x))  # its backward needs h, which second reads
            return self.second(h)

    backend = oasis_backend(rank=4, inner="aot_eager")
    torch.compile(Kept(), backend=backend)(torch.randn(500, 32)).sum().backward()
    (found,) = backend.report()
    first, second = found.rows
    assert first.note == "X is an input" and "X also kept" in second.note
    assert second.saved_bytes_after >= second.saved_bytes_before == 4 * 500 * 32


def test_a_column_by_itself_has_its_whole_name() -> None:
    """On a narrow page a row is a card, and "after" alone would not say of what."""
    headers = ("name", "saved MiB\nbefore", "\nafter", "note", "dW GFLOP\nbefore", "\nafter")
    assert Table(headers, []).labels == [
        *("name", "saved MiB before", "saved MiB after", "note", "dW GFLOP before", "dW GFLOP after"),
    ]
