"""Checkpoints that are not quite ours: of torch's optimizers, changed by hooks, with entries missing or foreign."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD
from oasis_fx.errors import OasisWarning
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

SPEC = SubspaceSpec(3)


def dense_weights() -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(name, torch.nn.Parameter(torch.randn(6, 4, generator=generator))) for name in ("a", "b")]


def dense_run(optimizer, weights, steps) -> None:
    for step in steps:
        for number, (_, weight) in enumerate(weights):
            weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + number))
        optimizer.step()


PEERS = {
    "adamw": (lambda p: torch.optim.AdamW(p, 0.05), OasisAdamW),
    "adamw, fused": (lambda p: torch.optim.AdamW(p, 0.05, fused=True), OasisAdamW),
    "adamw, capturable": (lambda p: torch.optim.AdamW(p, 0.05, foreach=True), OasisAdamW),
    "adam without decay": (lambda p: torch.optim.Adam(p, 0.05), OasisAdamW),
    "adamw into muon": (lambda p: torch.optim.AdamW(p, 0.05), OasisMuon),
    "sgd": (lambda p: torch.optim.SGD(p, 0.05, momentum=0.8), OasisSGD),
    "sgd, nesterov": (lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, nesterov=True), OasisSGD),
    "sgd without momentum": (lambda p: torch.optim.SGD(p, 0.05), OasisSGD),
}


@pytest.mark.parametrize("kind", PEERS)
def test_a_run_of_stock_goes_on_under_ours(kind) -> None:
    stock, make = PEERS[kind]
    weights = dense_weights()
    theirs = stock([weight for _, weight in weights])
    dense_run(theirs, weights, range(3))
    saved = copy.deepcopy(theirs.state_dict())
    again = [(name, torch.nn.Parameter(weight.detach().clone())) for name, weight in weights]
    ours = make(again, lr=9.0)  # the learning rate, decay and betas are the checkpoint's
    ours.load_state_dict(saved)
    dense_run(theirs, weights, range(3, 6)), dense_run(ours, again, range(3, 6))
    for (_, one), (_, other) in zip(weights, again, strict=True):
        torch.testing.assert_close(one, other)
    for group in ours.param_groups:
        assert set(ours.defaults) <= set(group) and group["lr"] == 0.05
    dense = [state for state in ours.state.values() if "features" in state or state.get("full_rank")]
    assert not dense
    # What comes of it is a checkpoint of ours as any other.
    resumed = make(again)
    resumed.load_state_dict(ours.state_dict())
    assert resumed.param_groups[0]["step_count"] == 3


@pytest.mark.parametrize(
    ("stock", "make", "message"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), OasisAdamW, r"amsgrad is True in group 0 .* OasisAdamW has no"),
        (lambda p: torch.optim.AdamW(p, maximize=True), OasisAdamW, "maximize is True in group 0"),
        (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.5), OasisSGD, "dampening is 0.5 in group 0"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), OasisAdamW, "parameter a has no saved 'exp_avg'"),
        (lambda p: torch.optim.RMSprop(p), OasisAdamW, "parameter a has no saved 'exp_avg'"),
        (lambda p: torch.optim.AdamW(p), OasisSGD, "parameter a has no saved 'momentum_buffer': OasisSGD needs one"),
    ],
)
def test_what_ours_cannot_go_on_with_is_refused_by_name(stock, make, message) -> None:
    weights = dense_weights()
    theirs = stock([weight for _, weight in weights])
    dense_run(theirs, weights, range(2))
    ours = make(weights)
    settings = copy.deepcopy(ours.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state and ours.state_dict()["param_groups"] == settings


@pytest.mark.parametrize(
    "stock",
    [lambda p: torch.optim.Adam(p, weight_decay=0.1), lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=0.1)],
)
def test_a_decay_that_means_something_else_is_told(stock) -> None:
    weights = dense_weights()
    theirs = stock([weight for _, weight in weights])
    dense_run(theirs, weights, range(1))
    make = OasisSGD if isinstance(theirs, torch.optim.SGD) else OasisAdamW
    with pytest.warns(OasisWarning, match=r"group 0 .* weight decay of 0\.1 within the gradient"):
        make(weights).load_state_dict(theirs.state_dict())


# A weight in a subspace


def low_rank_run(products, weight, optimizer, steps) -> None:
    for step in steps:
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        (y,) = products(x, [weight], SPEC)
        y.sin().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def low_rank(products, make_weight, make=OasisAdamW, steps=3):
    weight = make_weight(5, 8)
    optimizer = make([("w", weight)], lr=0.05)
    low_rank_run(products, weight, optimizer, range(steps))
    return weight, optimizer


ALL = [OasisAdamW, OasisSGD, OasisLion, OasisMuon]
COUNTS = [float, int, torch.tensor, lambda v: torch.tensor([v]), lambda v: torch.tensor([[v]], dtype=torch.float64)]
COUNTS += [lambda v: torch.tensor(int(v)), lambda v: torch.tensor(v, dtype=torch.bfloat16)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_a_step_count_of_any_kind(make, count, products, make_weight) -> None:
    weight, optimizer = low_rank(products, make_weight, make)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = count(float(saved["state"][0]["step"]))
    again = torch.nn.Parameter(weight.detach().clone())
    resumed = make([("w", again)])
    resumed.load_state_dict(saved)
    step = resumed.state[again]["step"]
    assert step.shape == () and step.dtype == torch.float32 and float(step) == 3
    low_rank_run(products, weight, optimizer, range(3, 5)), low_rank_run(products, again, resumed, range(3, 5))
    assert torch.equal(weight, again)


OWN_SETTINGS = [
    "step_count",
    "rank_plans",
    "rank_scaling",
    "stochastic_rounding",
    "step_outside_subspace",
    "full_size_states",
]


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_settings_that_a_checkpoint_lacks_are_those_of_the_optimizer(make, products, make_weight) -> None:
    weight, optimizer = low_rank(products, make_weight, make)
    saved = copy.deepcopy(optimizer.state_dict())
    for key in (*OWN_SETTINGS, "state_bits", "nesterov", "scale", "limit", "weight_decay", "eps"):
        saved["param_groups"][0].pop(key, None)
    again = torch.nn.Parameter(weight.detach().clone())
    resumed = make([("w", again)])
    resumed.load_state_dict(saved)
    assert {**resumed.param_groups[0], "params": [], "step_count": 3} == {**optimizer.param_groups[0], "params": []}
    low_rank_run(products, weight, optimizer, range(3, 5)), low_rank_run(products, again, resumed, range(3, 5))
    assert torch.equal(weight, again)


def test_counts_of_a_basis_that_a_checkpoint_lacks(products, make_weight) -> None:
    weight, optimizer = low_rank(products, make_weight)
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("basis_updates", "basis_steps", "subspace"):
        del saved["state"][0][key]
    again = torch.nn.Parameter(weight.detach().clone())
    resumed = OasisAdamW([("w", again)])
    resumed.load_state_dict(saved)
    low_rank_run(products, weight, optimizer, range(3, 5)), low_rank_run(products, again, resumed, range(3, 5))
    assert torch.equal(weight, again)  # the next move is none from a random start


def test_what_is_foreign_stays_as_torch_keeps_it(products, make_weight) -> None:
    weight, optimizer = low_rank(products, make_weight)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] |= {"ema": {"decay": 0.9}, 77: {"step": 3}, "note": "text", None: 5}
    saved["state"]["0"] = dict(saved["state"][0])  # as torch.distributed.checkpoint leaves there
    saved["state"][0] |= {"note": "abc", "number": 4, "listed": [1, 2], "extra": torch.ones(2), "nothing": None}
    saved["param_groups"][0] |= {"initial_lr": 0.5, "tag": "body", "fused": None}
    again = torch.nn.Parameter(weight.detach().clone())
    resumed = OasisAdamW([("w", again)])
    for _ in range(2):  # with what it gives itself, too
        resumed.load_state_dict(saved)
        state = resumed.state[again]
        assert (state["note"], state["number"], state["listed"], state["nothing"]) == ("abc", 4, [1, 2], None)
        assert torch.equal(state["extra"], torch.ones(2))
        assert resumed.state["ema"] == {"decay": 0.9} and resumed.state["note"] == "text" and resumed.state[None] == 5
        group = resumed.param_groups[0]
        assert (group["initial_lr"], group["tag"], group["fused"]) == (0.5, "body", None)
        saved = resumed.state_dict()
    resumed.resize_checkpoint(saved, 2)
    low_rank_run(products, weight, optimizer, range(3, 5)), low_rank_run(products, again, resumed, range(3, 5))
    assert torch.equal(weight, again)
    resumed.resize_rank(2)
    assert resumed.state[again]["exp_avg"].shape == (5, 2)


# Hooks


def test_what_hooks_return_is_loaded_and_what_they_see_is_whole(products, make_weight) -> None:
    _, optimizer = low_rank(products, make_weight)
    good = optimizer.state_dict()
    other = OasisAdamW([("w", make_weight(5, 8))], lr=0.5)
    seen = {}
    other.register_load_state_dict_pre_hook(lambda _, given: {**given["inner"]})
    other.register_load_state_dict_pre_hook(lambda _, given: given["param_groups"][0].update(lr=0.25))
    other.register_load_state_dict_post_hook(lambda o: seen.update({**o.state[o.param_groups[0]["params"][0]]}))
    other.load_state_dict({"inner": copy.deepcopy(good)})
    assert other.param_groups[0]["lr"] == 0.25
    assert torch.equal(seen["basis"], good["state"][0]["basis"]) and seen["basis"].dtype == torch.float64
    assert "subspace" not in seen
    assert (
        len(other._optimizer_load_state_dict_pre_hooks) == 2 and len(other._optimizer_load_state_dict_post_hooks) == 1
    )


def test_hooks_of_state_dict_see_and_change_what_is_saved(products, make_weight) -> None:
    _, optimizer = low_rank(products, make_weight)
    order = []
    optimizer.register_state_dict_pre_hook(lambda _: order.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, packed: order.append(packed["state"][0]["subspace"]))
    optimizer.register_state_dict_post_hook(lambda _, packed: {"inner": packed})
    saved = optimizer.state_dict()
    assert list(saved) == ["inner"] and saved["inner"]["state"][0]["subspace"] == 0 and order == ["before", 0]
    assert len(optimizer._optimizer_state_dict_post_hooks) == 2


def test_a_hook_that_raises_leaves_no_hooks_of_ours(products, make_weight) -> None:
    _, optimizer = low_rank(products, make_weight)
    saved, before = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())

    def fail(*_):
        raise KeyError("mine")

    for register in (optimizer.register_load_state_dict_pre_hook, optimizer.register_state_dict_post_hook):
        handle = register(fail)
        with pytest.raises(KeyError, match="mine"):
            optimizer.load_state_dict(saved), optimizer.state_dict()
        handle.remove()
    assert not optimizer._optimizer_load_state_dict_pre_hooks and not optimizer._optimizer_state_dict_post_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


# What does not fit


def changed(saved, *, without=(), **entries):
    saved = copy.deepcopy(saved)
    saved["state"][0].update(entries)
    for key in without:
        del saved["state"][0][key]
    return saved


def test_what_does_not_fit_names_the_parameter_and_loads_nothing(products, make_weight) -> None:
    weight, optimizer = low_rank(products, make_weight)
    good = optimizer.state_dict()
    wrong = {
        "parameter w has no saved 'exp_avg_sq'": changed(good, without=["exp_avg_sq"]),
        "parameter w has a saved step of None": changed(good, without=["step"]),
        "parameter w has a saved step of '3'": changed(good, step="3"),
        r"parameter w has a saved step of tensor\(\[1., 1.\]\)": changed(good, step=torch.ones(2)),
        "parameter w has a saved step of -1": changed(good, step=-1),
        "parameter w has a saved 'exp_avg' of type NoneType": changed(good, exp_avg=None),
        "parameter w has a saved 'exp_avg' of type list": changed(good, exp_avg=[1.0]),
        "parameter w has a saved 'exp_avg' of torch.uint8: .* with a scale for each 256": changed(
            good, exp_avg=torch.zeros(5, 3, dtype=torch.uint8)
        ),
        "parameter w has a saved 'exp_avg' of torch.int64": changed(good, exp_avg=torch.zeros(5, 3, dtype=torch.int64)),
        "parameter w has saved states in a subspace, and no saved basis": changed(good, without=["basis"]),
        "parameter w has a saved basis of another rule than the backend's, 'oja'": changed(
            good, without=["basis"], basis_code=torch.zeros(3, dtype=torch.int64)
        ),
        "parameter w has a saved state of type list": {**good, "state": {0: []}},
        "the state dict has no 'param_groups'": {"state": {}},
        "the state dict has no 'state'": {"param_groups": good["param_groups"]},
        "different number of parameter groups": {**good, "param_groups": good["param_groups"] * 2},
        "doesn't match the size": {**good, "param_groups": [{**good["param_groups"][0], "params": [0, 1]}]},
        "lr is '0.1': it must be": {**good, "param_groups": [{**good["param_groups"][0], "lr": "0.1"}]},
    }
    low_rank_run(products, weight, optimizer, range(3, 4))
    before, bases = copy.deepcopy(optimizer.state_dict()), STORE.existing(weight, SPEC).basis.detach().clone()
    for message, saved in wrong.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for key, value in before["state"][0].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][0][key])), (message, key)
        assert torch.equal(STORE.existing(weight, SPEC).basis, bases)
        assert weight in optimizer.bindings


def test_one_that_does_not_fit_keeps_all_others_from_loading(products, make_weight) -> None:
    """The second weight's basis is of another rule: the first one's would have been poured into the store by then."""
    weights = [make_weight(5, 8, seed=seed) for seed in (1, 2)]
    optimizer = OasisAdamW([("v", weights[0]), ("w", weights[1])])
    for weight in weights:
        low_rank_run(products, weight, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]["basis"]
    saved["state"][1]["basis_code"] = torch.zeros(3, dtype=torch.int64)
    for weight in weights:
        low_rank_run(products, weight, optimizer, range(1, 2))
    bases = [STORE.existing(weight, SPEC).basis.detach().clone() for weight in weights]
    with pytest.raises(ValueError, match="parameter w has a saved basis of another rule"):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(STORE.existing(w, SPEC).basis, basis) for w, basis in zip(weights, bases, strict=True))


def test_a_checkpoint_in_a_file_is_what_state_dict_gave(products, make_weight) -> None:
    _, optimizer = low_rank(products, make_weight)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert found["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(found["state"][0]["basis"], optimizer.state_dict()["state"][0]["basis"])
