"""What a method keeps while it trains: gradients, optimizer, and activations for the backward pass."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.experiments import byte_lm, methods


def measure(name: str, *, model: str, rank: int | float | str, batch: int, length: int, **fixed: Any) -> dict[str, int]:
    """Bytes by kind, of real tensors in the second step; gradients are those that outlive the backward pass."""
    from oasis_fx.inspect.measure import gradient_bytes, optimizer_bytes, saved_for_backward_bytes

    torch._dynamo.reset()
    network, method = byte_lm.byte_lm(model, 0).to(fixed["device"]), methods.METHODS[name]
    optimizer = methods.build(
        method, network, rank=rank, lr=1e-3, weight_decay=0.0, inner=fixed["inner"], rank_scaling=True
    )
    tokens, targets = torch.randint(256, (2, batch, length), device=fixed["device"])
    network(tokens, targets).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = network(tokens, targets)
    bases = [subspace.basis for subspace in getattr(optimizer, "subspaces", dict)()]
    saved = saved_for_backward_bytes(loss, [*network.parameters(), *bases, tokens, targets])
    loss.backward()
    found = {
        "activations": saved,
        "gradients": gradient_bytes(network.parameters()),
        "optimizer": optimizer_bytes(optimizer),
    }
    return found | {"sum": sum(found.values())}


def table(names: list[str], **fixed: Any) -> list[list[Any]]:
    return [[name, *(value / 2**20 for value in measure(name, **fixed).values())] for name in names]


HEADERS = ["method", "activations MiB", "gradients MiB", "optimizer MiB", "sum MiB"]
