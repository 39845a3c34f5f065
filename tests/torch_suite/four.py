"""The four optimizers as torch's own tests of optimizers take them: by a name, with parameters and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD

FOUR: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "OasisAdamW": OasisAdamW,
    "OasisSGD": OasisSGD,
    "OasisLion": OasisLion,
    "OasisMuon": OasisMuon,
}
PEERS: dict[str, type[torch.optim.Optimizer]] = {"OasisAdamW": torch.optim.AdamW, "OasisSGD": torch.optim.SGD}

every = pytest.mark.parametrize("make", FOUR.values(), ids=list(FOUR))


def database() -> Any:
    """torch's module of what its own tests try optimizers with. Not imported at once: it has effects, see below."""
    from torch.testing._internal import common_optimizers

    # It forbids to set `torch.backends.*` from then on, for other tests in this process too.
    torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True
    return common_optimizers


def info_of(peer: type[torch.optim.Optimizer]) -> Any:
    """What torch's database of optimizers has of a stock one."""
    (found,) = (info for info in database().optim_db if info.optim_cls is peer)
    return found


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    """A matrix, a vector, a convolution's weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes: Sequence[tuple[int, ...]] = ((4, 5), (5,), (3, 2, 2, 2))
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def give_gradients(params: Sequence[torch.Tensor], seed: int = 0) -> None:
    """The same gradients for equal seeds, whatever the parameters' dtype and layout."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for parameter in params:
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = drawn.to(parameter.dtype)


def steps(optimizer: torch.optim.Optimizer, params: Sequence[torch.Tensor], numbers: Sequence[int]) -> None:
    for number in numbers:
        give_gradients(params, number)
        optimizer.step()


def copies(params: Sequence[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def assert_equal_states(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two state dicts with equal numbers, kinds and settings."""
    one, other = (torch.utils._pytree.tree_flatten(state) for state in (found, expected))
    assert one[1] == other[1]
    for left, right in zip(one[0], other[0], strict=True):
        if isinstance(right, torch.Tensor):
            assert torch.equal(left, right) and left.dtype == right.dtype
        else:
            assert left == right
