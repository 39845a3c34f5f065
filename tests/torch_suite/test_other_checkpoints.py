"""Checkpoints that are not as the four optimizers write them now: of stock ones, of old torch, in another order."""

from __future__ import annotations

import copy

import pytest
import torch

from .four import FOUR, PEERS, copies, every, parameters, steps

pytestmark = pytest.mark.slow


@pytest.fixture
def begun():
    """An optimizer after two steps, with its parameters."""

    def begin(make, **settings):
        params = parameters()
        optimizer = make(params, **settings)
        steps(optimizer, params, range(2))
        return params, optimizer

    return begin


@every
def test_the_order_of_named_groups_may_be_changed_by_a_hook(make) -> None:
    """torch's documentation of `load_state_dict`: a pre-hook that matches parameters by name."""
    params = parameters()
    optimizer = make([(f"p{i}", p) for i, p in enumerate(params)])
    steps(optimizer, params, range(2))
    saved = optimizer.state_dict()
    others = copies(params)[::-1]
    resumed = make([(f"p{len(others) - 1 - i}", p) for i, p in enumerate(others)])

    def by_name(this, state):
        old = {n: i for i, n in enumerate(state["param_groups"][0]["param_names"])}
        names = this.param_groups[0]["param_names"]
        states = {i: state["state"][old[name]] for i, name in enumerate(names)}
        groups = [{**state["param_groups"][0], "param_names": names, "params": list(range(len(names)))}]
        return {**state, "state": states, "param_groups": groups}

    resumed.register_load_state_dict_pre_hook(by_name)
    resumed.load_state_dict(saved)
    for i, parameter in enumerate(params):
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(torch.as_tensor(resumed.state[others[len(others) - 1 - i]][key]), torch.as_tensor(value))


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
@every
def test_a_step_that_is_a_number(make, kind, begun) -> None:
    """As in checkpoints of torch before 1.12."""
    params, optimizer = begun(make)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = kind(float(entry["step"])) if kind is torch.tensor else kind(entry["step"])
    others = copies(params)
    resumed = make(others)
    resumed.load_state_dict(saved)
    steps(optimizer, params, range(2, 4)), steps(resumed, others, range(2, 4))
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))


@pytest.mark.parametrize("name", PEERS)
def test_a_state_dict_of_the_stock_peer_goes_on_as_it_would_have(name) -> None:
    params = parameters(torch.float64)
    settings = {"lr": 0.05, "weight_decay": 0.0, **({"momentum": 0.9} if name == "OasisSGD" else {})}
    stock = PEERS[name](params, **settings)
    steps(stock, params, range(3))
    others = copies(params)
    ours = FOUR[name](others, lr=1.0)
    ours.load_state_dict(copy.deepcopy(stock.state_dict()))
    steps(stock, params, range(3, 6)), steps(ours, others, range(3, 6))
    for one, other in zip(params, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
