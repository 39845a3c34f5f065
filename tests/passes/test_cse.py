"""One activation, reshaped by each of its readers, is one node of the joint graph and has one projection."""

from __future__ import annotations

import torch

from oasis_fx import oasis_backend
from oasis_fx.graph.edits import aten


class Attention(torch.nn.Module):
    """Three layers that each flatten what they read by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(6, 5, bias=False, dtype=torch.float64) for _ in range(3))

    def forward(self, x):
        x = x.sin()
        return self.q(x).flatten(0, 1) * self.k(x.view(12, 6)) + self.v(x.reshape(12, 6))


def test_a_reshaped_activation_is_projected_once() -> None:
    backend = oasis_backend(2, inner="aot_eager")
    torch.compile(Attention(), backend=backend)(torch.randn(3, 4, 6, dtype=torch.float64)).sum().backward()
    (graph,) = backend.compiled_graphs()
    assert len(graph.trace.sites) == 3
    sizes = [tuple(n.meta["val"].shape) for n in graph.trace.after.graph.nodes if n.target is aten.mm.default]
    # P [N, r] and C [n, r] once; G [m, r] of each weight.
    assert [sizes.count(size) for size in ((12, 2), (6, 2), (5, 2))] == [1, 1, 3]
