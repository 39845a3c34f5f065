"""When ranks are shared out by default, and what subspaces take along when their rank changes or a run is resumed."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from oasis_fx import AutoRank, OasisAdamW, oasis_backend
from oasis_fx.runtime.optim import step as optimizer_step
from oasis_fx.runtime.subspaces.rules import Oja

from . import narrow_and_wide
from .narrow_and_wide import Net

train = partial(narrow_and_wide.train, shape=(64, 32))


def start(rank, **settings):
    torch._dynamo.reset()
    model = Net(32).double()
    compiled = torch.compile(model, backend=oasis_backend(rank, inner="aot_eager", **settings))
    return model, compiled, OasisAdamW(model.parameters(), lr=1e-2)


def test_ranks_are_shared_out_at_the_hundredth_step_and_the_thousandth() -> None:
    """The count of steps is set, and not all of them are taken."""
    _, compiled, optimizer = start(AutoRank(0.25))
    group = optimizer.param_groups[0]
    shared_out = []
    for step in (1, 21, 98, 99, 100, 101, 998, 999, 1000, 1001, 5000):
        group["step_count"] = step - 1
        before = group["rank_plans"]
        train(compiled, optimizer, [step])
        shared_out += [step] * (group["rank_plans"] - before)
    assert shared_out == [100, 1000]
    assert tuple(shared_out) == optimizer_step.RANK_STEPS


def test_another_rank_keeps_the_step_size_that_was_found() -> None:
    _, compiled, optimizer = start(8, subspace=Oja(lr="auto"))
    train(compiled, optimizer, range(6))
    rates = [float(subspace.log_rate) for subspace in optimizer.subspaces()]
    assert all(rate != 0 for rate in rates)
    optimizer.resize_rank(12)
    assert [float(subspace.log_rate) for subspace in optimizer.subspaces()] == rates
    train(compiled, optimizer, range(6, 7))
    assert all(float(subspace.log_rate) != 0 for subspace in optimizer.subspaces())


@pytest.mark.parametrize("when", ["before the first forward", "after some steps"])
def test_a_resumed_run_has_its_step_size_and_its_last_move(when) -> None:
    """Saved after four steps, in the midst of learning the rate."""
    model, compiled, optimizer = start(8, subspace=Oja(lr="auto"))
    train(compiled, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(compiled, optimizer, range(4, 9))
    rates = [float(subspace.log_rate) for subspace in optimizer.subspaces()]

    model, compiled, optimizer = start(8, subspace=Oja(lr="auto"))
    if when == "after some steps":
        train(compiled, optimizer, range(20, 22))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert train(compiled, optimizer, range(4, 9)) == expected
    assert [float(subspace.log_rate) for subspace in optimizer.subspaces()] == rates
