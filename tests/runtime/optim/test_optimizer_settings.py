"""Settings of parameter groups: what is allowed, and a ValueError for the rest, whenever it is set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD

ALL = [OasisAdamW, OasisSGD, OasisLion, OasisMuon]
NO_NUMBERS = ["1e-2", None, True, 1 + 0j, [0.1], math.nan, math.inf, -1e-9]

BAD = [
    *((make, name, value) for make in ALL for name in ("lr", "weight_decay") for value in NO_NUMBERS),
    *((make, "eps", value) for make in (OasisAdamW, OasisMuon) for value in ("1e-8", None, -1.0)),
    *((make, "lr", value) for make in ALL for value in (torch.ones(2), torch.tensor(-1.0), torch.tensor(1j))),
    *((make, "weight_decay", torch.tensor(0.1)) for make in ALL),
    *((make, "momentum", value) for make in (OasisSGD, OasisMuon) for value in ("0.9", True, 1.0, -0.1, math.nan)),
    *((OasisMuon, "limit", value) for value in ("2", 1.0, None, math.nan)),
    *((OasisMuon, "scale", value) for value in ("2", -1.0, None)),
    *((make, "stochastic_rounding", value) for make in ALL for value in (1, 0, "yes", torch.tensor(1.0))),
    *((OasisSGD, "nesterov", value) for value in (1, None, "no")),
    *((OasisAdamW, "state_bits", value) for value in (16, "8", 8.0, None, torch.ones(2))),
]
BETAS = [0.9, None, "ab", (0.9,), ("0.9", 0.99), (0.9, 1.0), (True, 0.9), (0.9, torch.ones(2)), (math.nan, 0.9)]
BAD += [(make, "betas", value) for make in (OasisAdamW, OasisLion, OasisMuon) for value in BETAS]


def describe(value: object) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


@pytest.mark.parametrize(("make", "name", "value"), BAD, ids=describe)
def test_what_is_not_allowed_is_refused_whenever_it_is_set(make, name, value) -> None:
    message = rf"^{name} is .*: it must be "
    weight, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        make([weight], **{name: value})
    optimizer = make([weight])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other], name: value})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [other]})
    optimizer.param_groups[1][name] = value
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(2)) and not optimizer.state
    optimizer.param_groups[1][name] = optimizer.defaults[name]
    optimizer.step()
    assert not torch.equal(weight.detach(), torch.ones(2))


def test_the_message_has_the_value_and_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"^lr is '1e-2': it must be a finite number from 0 \(or a one-element tensor"):
        OasisAdamW([torch.nn.Parameter(torch.ones(2))], lr="1e-2")


def run(make, steps: int = 4, change=None, **settings) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = make([weight], **settings)
    for step in range(steps):
        weight.grad = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * (8.0, -1.0)[step % 2]
        if change is not None:
            change(optimizer.param_groups[0], step)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, torch.tensor, lambda v: torch.tensor([v])])
@pytest.mark.parametrize("make", ALL, ids=describe)
def test_a_learning_rate_of_any_kind(make, kind) -> None:
    assert torch.equal(run(make, lr=kind(0.125)), run(make, lr=0.125))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("make", [OasisAdamW, OasisLion, OasisMuon], ids=describe)
def test_betas_may_be_tensors(make, shape) -> None:
    betas = tuple(torch.full(shape, value) for value in (0.5, 0.75))
    assert torch.equal(run(make, betas=betas), run(make, betas=(0.5, 0.75)))
    plain = run(make)
    assert not torch.equal(run(make, betas=betas), plain)


@pytest.mark.parametrize("make", ALL, ids=describe)
def test_a_tensor_that_is_changed_in_place_counts_from_the_next_step(make) -> None:
    def by_tensor(group, step):
        group["lr"].fill_(0.25 / (step + 1))

    def by_number(group, step):
        group["lr"] = 0.25 / (step + 1)

    found = run(make, change=by_tensor, lr=torch.tensor([9.0], dtype=torch.float64))
    assert torch.equal(found, run(make, change=by_number))


@pytest.mark.parametrize("make", ALL, ids=describe)
def test_schedulers_change_tensors_as_they_change_numbers(make) -> None:
    found = []
    for lr in (0.5, torch.tensor(0.5)):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = make([weight], lr=lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            weight.grad = torch.ones(3)
            optimizer.step()
            schedule.step()
        assert float(optimizer.param_groups[0]["lr"]) == 0.0625
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize(("old", "new"), [("residual", "step_outside_subspace"), ("full_rank", "full_size_states")])
def test_settings_under_their_old_names_work_and_say_what_they_are_called_now(old, new) -> None:
    weight, other = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    with pytest.warns(DeprecationWarning, match=f"'{old}', which is called '{new}' since 0.3"):
        optimizer = OasisAdamW([weight], **{old: True})
    assert optimizer.param_groups[0][new] is True and old not in optimizer.param_groups[0]
    with pytest.warns(DeprecationWarning, match=f"'{old}', which is called '{new}' since 0.3"):
        optimizer.add_param_group({"params": [other], old: False})
    assert [group[new] for group in optimizer.param_groups] == [True, False]
    optimizer.param_groups[1][old] = True  # as a scheduler may
    weight.grad = torch.ones_like(weight)
    with pytest.warns(DeprecationWarning, match=f"parameter group 1 has the setting '{old}'"):
        optimizer.step()
    assert optimizer.param_groups[1][new] is True and old not in optimizer.param_groups[1]
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group[old] = group.pop(new)
    resumed = OasisAdamW([{"params": [weight]}, {"params": [other]}])
    with pytest.warns(DeprecationWarning, match=f"group 0 of the state dict has the setting '{old}'"):
        resumed.load_state_dict(saved)
    assert all(group[new] is True and old not in group for group in resumed.param_groups)
    assert all(old in group for group in saved["param_groups"])  # which is the caller's


def test_the_step_count_of_a_checkpoint_may_have_its_old_name() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = OasisAdamW([weight])
    weight.grad = torch.ones_like(weight)
    for _ in range(3):
        optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["rounding_seed"] = saved["param_groups"][0].pop("step_count")
    del saved["param_groups"][0]["rank_scaling"]  # a checkpoint of ours from before there was any
    resumed = OasisAdamW([weight])
    resumed.load_state_dict(saved)
    group = resumed.param_groups[0]
    assert group["step_count"] == 3 and "rounding_seed" not in group and group["rank_scaling"] is False
    pickled = {**optimizer.__getstate__(), "param_groups": [dict(group) for group in optimizer.param_groups]}
    pickled["param_groups"][0]["rounding_seed"] = pickled["param_groups"][0].pop("step_count")
    restored = OasisAdamW.__new__(OasisAdamW)
    restored.__setstate__(pickled)
    assert restored.param_groups[0]["step_count"] == 3 and "rounding_seed" not in restored.param_groups[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [("amsgrad", True), ("fused", False), ("foreach", True), ("maximize", True), ("capturable", True)],
)
def test_options_of_torch_that_are_not_there_are_refused_with_the_reason(option, value) -> None:
    weights = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match=rf"{option} is {value}: OasisAdamW takes .* alone \(.*\); leave it out"):
        OasisAdamW(weights, **{option: value})


def test_options_of_torch_that_change_nothing_are_taken() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2))]
    plain = OasisAdamW(weights).defaults
    assert OasisAdamW(weights, fused=True, amsgrad=False, foreach=None, maximize=False).defaults == plain
    with pytest.raises(TypeError, match="unexpected keyword argument 'amsgard'"):
        OasisAdamW(weights, amsgard=True)
