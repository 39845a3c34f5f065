"""Measured bytes against counts by hand."""

from __future__ import annotations

import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.inspect.measure import gradient_bytes, optimizer_bytes, saved_for_backward_bytes


def test_bytes_of_a_layer() -> None:
    torch._dynamo.reset()
    layer = torch.nn.Linear(40, 30, bias=False)
    x = torch.randn(100, 40)
    for function, kept in [(layer, 100 * 40), (lambda x: layer(torch.sin(x)), 100 * 40)]:
        loss = function(x).sum()
        expected = 0 if function is layer else kept  # x itself is known
        assert saved_for_backward_bytes(loss, [x, layer.weight]) == 4 * expected
    compiled = torch.compile(lambda x: layer(torch.sin(x)), backend=oasis_backend(rank=8, inner="aot_eager"))
    loss = compiled(x).sum()
    basis = 40 * 8
    assert saved_for_backward_bytes(loss, [x, layer.weight]) == 4 * (100 * 8 + basis + 1)  # P, C, and ||X||^2
    loss.backward()
    assert gradient_bytes(layer.parameters()) == 4 * 30 * 8
    optimizer = OasisAdamW(layer.parameters())
    optimizer.step()
    assert optimizer_bytes(optimizer) == 4 * (2 * 30 * 8 + basis + 1) + 2 * 8  # step; how often and when it moved
