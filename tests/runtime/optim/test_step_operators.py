"""What a step asks of the host does not grow with the depth of a model: it is asked for all weights of a shape."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD, oasis_backend
from oasis_fx.runtime.optim.kernels import dispatch
from oasis_fx.runtime.subspaces import host_reads


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def operators_and_launches(
    layers: int, dtype: torch.dtype, tail: int | None = None, make=OasisAdamW, width: int = 16
) -> tuple[int, int]:
    """Of the fourth step: the first ones make states, and first moves."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(Block(width) for _ in range(layers))).to(dtype)
    compiled = torch.compile(net, backend=oasis_backend(rank=4, tail=tail, inner="aot_eager"))
    optimizer = make(net.parameters())
    launches: list[int] = []
    made = dispatch.Kernels(lambda *_, **__: launches.append(1), lambda *_, **__: launches.append(1))
    with pytest.MonkeyPatch.context() as patch:  # the path that a GPU takes
        patch.setattr(host_reads, "reads_are_free", lambda device: False)
        patch.setattr(dispatch, "DEVICES", ("cpu",))
        patch.setattr(dispatch, "_kernels", lambda: made)
        for _ in range(4):
            compiled(torch.randn(8, width, dtype=dtype)).square().mean().backward()
            launches.clear()
            with Calls() as calls:
                optimizer.step()
            optimizer.zero_grad()
    return calls.count, len(launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_operators_nor_launches_grow_with_depth(dtype) -> None:
    (few, launches), (many, launches_of_many) = (operators_and_launches(layers, dtype) for layers in (2, 6))
    assert many <= 1.1 * few + 5 and launches_of_many == launches
    assert few <= 325


@pytest.mark.parametrize("make", [OasisSGD, OasisLion, OasisMuon], ids=lambda make: make.__name__)
def test_operators_of_other_optimizers_do_not_grow_with_depth(make) -> None:
    (few, launches), (many, of_many) = (operators_and_launches(n, torch.bfloat16, make=make) for n in (2, 6))
    assert many <= 1.1 * few + 5 and of_many == launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_in_eight_bits_take_at_most_twice_the_operators(dtype) -> None:
    pytest.importorskip("torchao")
    width = 1024  # moments of 1024 x 4 numbers and more are codes

    def eight(params):
        return OasisAdamW(params, state_bits=8)

    (plain, _), (few, launches), (many, of_many) = (
        operators_and_launches(n, dtype, make=make, width=width)
        for n, make in ((2, OasisAdamW), (2, eight), (6, eight))
    )
    assert many <= 1.1 * few + 5 and of_many == launches
    assert few <= 2 * plain


def test_launches_do_not_grow_with_depth_where_there_are_tails() -> None:
    """Operators grow by two views of each factor and a count on the host for each basis, which cost a GPU nothing."""
    weights_more = 2 * 4
    (few, launches), (many, launches_of_many) = (operators_and_launches(n, torch.bfloat16, tail=4) for n in (2, 6))
    assert many <= few + 3 * weights_more + 5 and launches_of_many == launches
