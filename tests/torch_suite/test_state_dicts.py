"""State dicts of the four optimizers, as torch's tests try them: round trips, hooks, older ones, names, dtypes."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from .four import assert_equal_states, copies, every, parameters, steps

pytestmark = pytest.mark.slow


@pytest.fixture
def begun():
    """An optimizer after two steps, with its parameters."""

    def begin(make, dtype=torch.float32, **settings):
        params = parameters(dtype)
        optimizer = make(params, **settings)
        steps(optimizer, params, range(2))
        return params, optimizer

    return begin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@every
def test_a_round_trip_through_a_file_goes_on_bitwise(make, dtype, begun) -> None:
    params, optimizer = begun(make, dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert_equal_states(saved, optimizer.state_dict())
    others = copies(params)
    resumed = make(others, lr=123.0)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    steps(optimizer, params, range(2, 5)), steps(resumed, others, range(2, 5))
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))
    assert_equal_states(resumed.state_dict(), optimizer.state_dict())


@every
def test_loading_changes_neither_the_state_dict_nor_what_it_came_from(make, begun) -> None:
    params, optimizer = begun(make)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    others = copies(params)
    resumed = make(others)
    resumed.load_state_dict(saved)
    assert_equal_states(saved, kept)
    steps(resumed, others, range(2, 4))
    assert_equal_states(optimizer.state_dict(), kept)  # no memory is shared


@every
def test_a_state_dict_is_the_same_twice_and_shares_the_states(make, begun) -> None:
    params, optimizer = begun(make)
    assert_equal_states(optimizer.state_dict(), optimizer.state_dict())
    first = optimizer.state_dict()["state"][0]
    kind = next(key for key, value in first.items() if isinstance(value, torch.Tensor) and value.dim() > 0)
    assert first[kind].data_ptr() == optimizer.state[params[0]][kind].data_ptr()


@every
def test_groups_that_do_not_fit_are_refused(make, begun) -> None:
    params, optimizer = begun(make)
    before = copy.deepcopy(optimizer.state_dict())
    fewer = copy.deepcopy(before)
    fewer["param_groups"][0]["params"].pop()
    more = copy.deepcopy(before)
    more["param_groups"].append(copy.deepcopy(more["param_groups"][0]))
    for wrong, message in ((fewer, "doesn't match the size"), (more, "different number of parameter groups")):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)
        assert_equal_states(optimizer.state_dict(), before)
    assert params


@every
def test_hooks_of_state_dict(make, begun) -> None:
    _, optimizer = begun(make)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda this: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda this, state: {**state, "more": len(seen)})
    optimizer.register_state_dict_post_hook(lambda this, state: seen.append("first"), prepend=True)
    assert optimizer.state_dict()["more"] == 2 and seen == ["pre", "first"]


@every
def test_hooks_of_load_state_dict(make, begun) -> None:
    """A pre-hook may return another dict, which is the one that counts; a post-hook sees what was loaded."""
    params, optimizer = begun(make)
    saved = optimizer.state_dict()
    other = make(copies(params))
    seen = []

    def change(this, state):
        state = {**state, "param_groups": [{**group, "lr": 0.125} for group in state["param_groups"]]}
        seen.append("pre")
        return state

    other.register_load_state_dict_pre_hook(change)
    other.register_load_state_dict_pre_hook(lambda this, state: seen.append("before it"), prepend=True)
    other.register_load_state_dict_post_hook(lambda this: seen.append(this.param_groups[0]["lr"]))
    other.load_state_dict(saved)
    assert seen == ["before it", "pre", 0.125] and other.param_groups[0]["lr"] == 0.125
    assert saved["param_groups"][0]["lr"] != 0.125


@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)], ids=str)
@every
def test_between_named_parameters_and_others(make, named) -> None:
    made = []
    for with_names in named:
        params = parameters()
        given = [(f"p{i}", p) for i, p in enumerate(params)] if with_names else params
        made.append((params, make(given)))
    (params, optimizer), (others, resumed) = made
    steps(optimizer, params, range(2))
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for other, parameter in zip(others, params, strict=True):
            other.copy_(parameter)
    steps(optimizer, params, range(2, 4)), steps(resumed, others, range(2, 4))
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))


@every
def test_a_state_dict_from_before_our_settings(make, begun) -> None:
    """Settings that a checkpoint does not know have the values of a new optimizer, but for `rank_scaling`: off."""
    params, optimizer = begun(make)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("rank_plans", "step_outside_subspace", "full_size_states", "state_bits", "rank_scaling"):
        saved["param_groups"][0].pop(name, None)
    others = copies(params)
    resumed = make(others)
    resumed.load_state_dict(saved)
    steps(optimizer, params, range(2, 4)), steps(resumed, others, range(2, 4))
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))


@every
def test_states_are_there_after_a_step_and_a_new_group_has_none(make, begun) -> None:
    params, optimizer = begun(make)
    assert all(optimizer.state[p] for p in params)
    late = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late]})
    assert late not in optimizer.state
    saved = optimizer.state_dict()
    assert len(saved["param_groups"]) == 2 and saved["param_groups"][1]["params"] == [3] and 3 not in saved["state"]
    others = [*copies(params), torch.nn.Parameter(torch.ones(3))]
    resumed = make([{"params": others[:3]}, {"params": others[3:]}])
    resumed.load_state_dict(saved)
    steps(optimizer, [*params, late], range(2, 4)), steps(resumed, others, range(2, 4))
    assert all(torch.equal(one, other) for one, other in zip([*params, late], others, strict=True))
