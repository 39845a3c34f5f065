"""How many bytes a graph may keep for its backward pass: a share of what it would keep, or a number of bytes.

torch's partitioner takes shares only (`activation_memory_budget`), of what its min-cut keeps of *this* graph. For a
number of bytes the share is searched for: the largest found under which the graph keeps no more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import fx

from oasis_fx.cost import saved_storages
from oasis_fx.torch_private import functorch_config

Partition = tuple[fx.GraphModule, fx.GraphModule]

_TRIALS = 6  # partitions beside the first; each costs seconds for a large graph


def share_budget(share: float) -> AbstractContextManager[Any]:
    """Within: torch's partitioner keeps at most this share of what it would keep, 0 to 1."""
    return functorch_config.patch(activation_memory_budget=float(share))  # type: ignore[no-any-return]


def fit_bytes(partition: Callable[[], Partition], num_forward_outputs: int, num_bytes: int) -> Partition:
    """Partition under the largest share found that keeps at most ``num_bytes`` of tensors that are no inputs.

    Args:
        partition: partitions a fresh copy of the graph under the share of the moment.
    """

    def attempt(share: float) -> tuple[Partition, int]:
        with share_budget(share):
            found = partition()
        return found, sum(saved_storages(found[0].graph, num_forward_outputs).values())

    whole, largest = attempt(1.0)
    if largest <= num_bytes:
        return whole
    best, kept = attempt(0.0)  # everything is recomputed from inputs: it fits whatever the budget is
    low, high = 0.0, 1.0
    for _ in range(_TRIALS):
        share = (low + high) / 2
        found, size = attempt(share)
        if size > num_bytes:
            high = share
        else:
            low = share
            if size >= kept:
                best, kept = found, size
    return best
