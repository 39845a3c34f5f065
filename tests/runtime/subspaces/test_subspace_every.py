"""`every=k`: bases move at each k-th optimizer step, by the statistic of that step."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from oasis_fx.runtime.optim.adamw import OasisAdamW
from oasis_fx.runtime.subspaces.basis_updates import update_bases
from oasis_fx.runtime.subspaces.rules import Oja
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

EVERY_3 = SubspaceSpec(3, Oja(every=3))


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(products, weights, spec, seed, scale=1.0) -> None:
    """One backward pass of both weights, which share a basis."""
    q, k = products(inputs(seed), weights, spec)
    ((q.square().mean() + k.sin().mean()) * scale).backward()


def build(make_weight):
    weights = [make_weight(5, 8, seed=1), make_weight(6, 8, seed=2)]
    return weights, OasisAdamW(weights, lr=0.05)


def train(products, weights, optimizer, steps, spec=EVERY_3) -> None:
    for step in steps:
        gradient(products, weights, spec, step)
        optimizer.step()
        optimizer.zero_grad()


def test_bases_move_at_the_first_step_and_each_third_from_there(products, make_weight) -> None:
    weights, optimizer = build(make_weight)
    moved = []
    for step in range(1, 8):
        gradient(products, weights, EVERY_3, step)
        subspace = STORE.existing(weights[0], EVERY_3)
        before = subspace.basis.detach().clone()
        optimizer.step()
        assert subspace.statistic is None and subspace.energy_sum is None
        if not torch.equal(subspace.basis, before):
            moved.append(step)
        optimizer.zero_grad()
    assert moved == [1, 4, 7] and int(subspace.num_updates) == 3


def test_the_move_is_by_the_last_steps_statistic(products, make_weight) -> None:
    weights, optimizer = build(make_weight)
    train(products, weights, optimizer, range(4))
    others, one = build(make_weight)
    each = SubspaceSpec(3)
    train(products, others, one, [0, 3], each)  # from the same start, by the inputs of those two steps alone
    bases = STORE.existing(weights[0], EVERY_3).basis, STORE.existing(others[0], each).basis
    assert torch.equal(*bases)


def test_micro_batches_are_one_step(products, make_weight) -> None:
    weights, optimizer = build(make_weight)
    train(products, weights, optimizer, [9])
    for micro in range(4):
        gradient(products, weights, EVERY_3, micro)
    optimizer.step()
    assert int(STORE.existing(weights[0], EVERY_3).steps_since_due) == 1


def test_a_batch_thrown_away_is_no_step(products, make_weight) -> None:
    weights, optimizer = build(make_weight)
    gradient(products, weights, EVERY_3, 0)
    optimizer.zero_grad()
    optimizer.step()
    assert int(STORE.existing(weights[0], EVERY_3).steps_since_due) == 2  # as at the start: the next step moves it


def test_a_step_that_is_left_out_counts_and_does_not_move(products, make_weight) -> None:
    weights, optimizer = build(make_weight)
    train(products, weights, optimizer, range(3))
    subspace = STORE.existing(weights[0], EVERY_3)
    before = subspace.basis.detach().clone()
    gradient(products, weights, EVERY_3, 2, scale=float("inf"))
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(subspace.basis, before)
    assert int(subspace.steps_since_due) == 0 and int(subspace.num_updates) == 1  # its turn has passed
    train(products, weights, optimizer, range(3, 6))
    assert int(subspace.num_updates) == 2


@pytest.mark.parametrize("skip", [False, True], ids=["", "after a step that was left out"])
@pytest.mark.parametrize("when", ["before the first forward", "after some steps"])
@pytest.mark.filterwarnings("ignore:a gradient is not finite")
def test_a_run_resumed_within_a_window_is_bitwise_the_uninterrupted_one(when, skip, products, make_weight) -> None:
    weights, optimizer = build(make_weight)
    train(products, weights, optimizer, range(4))
    if skip:
        gradient(products, weights, EVERY_3, 4, scale=float("inf"))
        optimizer.step(), optimizer.zero_grad()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": [w.detach() for w in weights]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(products, weights, optimizer, range(5, 10))

    again, resumed = build(make_weight)
    if when == "after some steps":
        train(products, again, resumed, range(50, 52))
    with torch.no_grad():
        for p, value in zip(again, saved["model"], strict=True):
            p.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    train(products, again, resumed, range(5, 10))
    for p, q in zip(weights, again, strict=True):
        assert torch.equal(p, q)
        for key in ("exp_avg", "exp_avg_sq", "basis", "basis_updates", "basis_steps"):
            assert torch.equal(optimizer.state[p][key], resumed.state[q][key]), key


def test_a_checkpoint_without_the_count_loads(products, make_weight) -> None:
    weights, optimizer = build(make_weight)
    train(products, weights, optimizer, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        del entry["basis_steps"]
    optimizer.load_state_dict(state)
    assert int(STORE.existing(weights[0], EVERY_3).steps_since_due) == 0


def test_a_shorter_period_takes_a_longer_ones_count_over(products, make_weight) -> None:
    weights, optimizer = build(make_weight)
    train(products, weights, optimizer, range(5), SubspaceSpec(3, Oja(every=9)))
    again, resumed = build(make_weight)
    resumed.load_state_dict(optimizer.state_dict())
    train(products, again, resumed, [5])
    subspace = STORE.existing(again[0], EVERY_3)
    assert int(subspace.num_updates) == 2 and int(subspace.steps_since_due) == 0


def test_graphs_with_other_periods_keep_their_own_bases(products, make_weight) -> None:
    weights, optimizer = build(make_weight)
    train(products, weights, optimizer, range(3), SubspaceSpec(3))
    train(products, weights, optimizer, range(3, 6), EVERY_3)
    assert int(STORE.existing(weights[0], SubspaceSpec(3)).num_updates) == 3
    assert int(STORE.existing(weights[0], EVERY_3).num_updates) == 1


def test_other_optimizers_count_by_update_bases(products, make_weight) -> None:
    weights, _ = build(make_weight)
    updates = []
    for step in range(4):
        gradient(products, weights, EVERY_3, step)
        update_bases(weights)
        updates.append(int(STORE.existing(weights[0], EVERY_3).num_updates))
        for weight in weights:
            weight.grad = None
    assert updates == [1, 1, 1, 2]


def test_a_bad_period_is_refused() -> None:
    with pytest.raises(ValueError, match="every is 0: it must be a whole number from 1"):
        SubspaceSpec(3, Oja(every=0))
