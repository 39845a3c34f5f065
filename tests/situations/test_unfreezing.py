"""Layers unfrozen one after another with `add_param_group`: a resumed run is bitwise the uninterrupted one."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx import OasisAdamW, OasisSGD, oasis_backend
from oasis_fx.runtime.subspaces.store import STORE


class Net(torch.nn.Module):
    """``0`` and ``1`` read one activation, and ``2`` and ``3`` another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(5))

    def forward(self, x):
        a, b, c, d, e = self.layers
        h = torch.tanh(a(x)) * b(x)
        h = h + torch.tanh(c(h)) * d(h)
        return e(h)


def build(stages, make):
    """The model with these stages unfrozen, and an optimizer with a group for each."""
    model = Net()
    optimizer = None
    model.requires_grad_(False)
    for stage in stages:
        optimizer = unfreeze(model, stage, optimizer, make)
    return model, optimizer


def unfreeze(model, stage, optimizer, make):
    parameters = [p for number in stage for p in model.layers[number].requires_grad_(True).parameters()]
    if optimizer is None:
        return make(parameters, lr=0.02)
    optimizer.add_param_group({"params": parameters})
    return optimizer


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend=oasis_backend(4, inner="aot_eager"))


def train(run, optimizer, steps) -> None:
    for step in steps:
        x = torch.randn(24, 12, generator=torch.Generator().manual_seed(step))
        (run(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


CASES = [
    ([[4], [2, 3], [0, 1]], OasisSGD, "before the first forward"),
    ([[1, 4], [0, 2], [3]], OasisAdamW, "before the first forward"),
    ([[3, 0], [1, 2]], OasisAdamW, "after some steps"),
]


@pytest.mark.parametrize(("stages", "make", "when"), CASES, ids=str)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(stages, make, when) -> None:
    """What was unfrozen later has a basis of its own in the run, and shared one with its fellow in the resumed one."""
    model, optimizer = build(stages[:1], make)
    run = compiled(model)
    train(run, optimizer, range(2))
    for number, stage in enumerate(stages[1:], 1):
        unfreeze(model, stage, optimizer, make)
        train(run, optimizer, range(2 * number, 2 * number + 2))
    begin = 2 * len(stages)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(run, optimizer, range(begin, begin + 3))

    again, resumed = build(stages, make)
    run = compiled(again)
    if when == "after some steps":
        train(run, resumed, range(50, 52))
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(run, resumed, range(begin, begin + 3))
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    numbers = [
        [entry["subspace"] for entry in o.state_dict()["state"].values() if "subspace" in entry]
        for o in (optimizer, resumed)
    ]
    assert numbers[0] == numbers[1]


def test_a_weight_that_is_frozen_later_keeps_up_with_the_basis_it_shares() -> None:
    """Frozen at the moment of the checkpoint and thawed after it: its moments follow the basis all the while."""
    both = [[0, 1], [2, 3, 4]]
    model, optimizer = build(both, OasisAdamW)
    run = compiled(model)
    train(run, optimizer, range(2))
    model.layers[1].requires_grad_(False)
    train(run, optimizer, range(2, 3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def go_on(model, run, optimizer):
        train(run, optimizer, range(3, 5))
        model.layers[1].requires_grad_(True)
        train(run, optimizer, range(5, 7))

    go_on(model, run, optimizer)
    again, resumed = build(both, OasisAdamW)
    again.layers[1].requires_grad_(False)
    run = compiled(again)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    go_on(again, run, resumed)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    first, second = (again.layers[number].weight for number in (0, 1))
    assert STORE.all_of(first)[0] is STORE.all_of(second)[0]
