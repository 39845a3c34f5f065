"""A checkpoint that is written right after a step was left out holds the count of steps that this step has made."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx.runtime.optim.adamw import OasisAdamW
from oasis_fx.runtime.subspaces.rules import Oja
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

EVERY_3 = SubspaceSpec(3, Oja(every=3))


def train(products, weight, optimizer, steps, scale: float = 1.0) -> None:
    for step in steps:
        x = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        (y,) = products(x, [weight], EVERY_3)
        (y.square().mean() * scale).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:a gradient is not finite")
def test_left_out_right_after_loading_and_saved_again(products, make_weight) -> None:
    """Between loading and the first step the state of a weight and its subspace have counts of their own."""
    weight = make_weight(5, 8)
    optimizer = OasisAdamW([weight], lr=0.05)
    train(products, weight, optimizer, range(4))  # moved at the first step and the fourth
    saved, values = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    train(products, weight, optimizer, [4], scale=float("inf"))
    train(products, weight, optimizer, range(5, 9))

    for _ in range(2):  # loaded, a step left out, saved, loaded again
        again = make_weight(5, 8)
        with torch.no_grad():
            again.copy_(values)
        resumed = OasisAdamW([again], lr=1.0)
        resumed.load_state_dict(saved)
        if int(saved["state"][0]["basis_steps"]) == 0:
            train(products, again, resumed, [4], scale=float("inf"))
            assert int(STORE.existing(again, EVERY_3).steps_since_due) == 1
            saved = copy.deepcopy(resumed.state_dict())
    assert int(saved["state"][0]["basis_steps"]) == 1
    train(products, again, resumed, range(5, 9))
    assert torch.equal(again, weight)
    for key in ("exp_avg", "basis", "basis_steps", "basis_updates"):
        assert torch.equal(resumed.state[again][key], optimizer.state[weight][key]), key
