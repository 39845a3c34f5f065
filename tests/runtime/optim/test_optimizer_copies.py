"""Copies and pickles of (model, optimizer), states that are cleared, parameters that are replaced or reshaped."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD, oasis_backend
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

SPEC = SubspaceSpec(3)
ALL = [OasisAdamW, OasisSGD, OasisLion, OasisMuon]


class Model(torch.nn.Module):
    """Two weights that share a basis, one that is by itself, one without a subspace."""

    def __init__(self, products, dtype=torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.products = products
        self.q, self.k, self.o = (torch.nn.Parameter(torch.randn(5, 8, dtype=dtype)) for _ in range(3))
        self.bias = torch.nn.Parameter(torch.zeros(5, dtype=dtype))

    def forward(self, x, spec=SPEC):
        q, k = self.products(x, [self.q, self.k], spec)
        (o,) = self.products(x.sin(), [self.o], spec)
        return (q.tanh() * k + self.bias - o).square().mean()


def train(model, optimizer, steps, spec=SPEC) -> None:
    for step in steps:
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(step)).to(model.q.dtype)
        model(x, spec).backward()
        optimizer.step()
        optimizer.zero_grad()


def build(products, make=OasisAdamW, dtype=torch.float64):
    model = Model(products, dtype)
    return model, make(model.named_parameters(), lr=0.02)


def assert_alike(one, other) -> None:
    for (name, p), (_, q) in zip(one[0].named_parameters(), other[0].named_parameters(), strict=True):
        assert p is not q and torch.equal(p, q), name
        for key, value in one[1].state[p].items():
            if key == "subspace":  # which one it is: not that of the other
                continue
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[1].state[q][key])), (name, key)


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle, through_a_file])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_a_copy_trains_as_the_original_would_and_leaves_it_alone(make, dtype, how, products) -> None:
    pair = build(products, make, dtype)
    train(*pair, range(3))
    silent = build(products, make, dtype)
    train(*silent, range(6))
    copied = how(pair)
    assert copied[1].param_groups[0]["params"][0] is copied[0].q
    train(*copied, range(3, 6))
    assert STORE.all_of(copied[0].q)[0] is STORE.all_of(copied[0].k)[0] is not STORE.all_of(pair[0].q)[0]
    train(*pair, range(3, 6))
    assert_alike(copied, pair)
    assert_alike(silent, pair)


def test_a_copy_of_a_copy_that_has_not_trained_yet(products) -> None:
    pair = build(products)
    train(*pair, range(3))
    copied = copy.deepcopy(copy.deepcopy(pair))
    train(*copied, range(3, 5)), train(*pair, range(3, 5))
    assert_alike(copied, pair)


def test_a_copy_after_a_change_of_rank_has_the_new_rank() -> None:
    """The backend of the copy still asks for the old one."""
    torch._dynamo.reset()
    model = torch.nn.Linear(8, 5)
    optimizer = OasisAdamW(model.parameters(), lr=0.02)
    run = torch.compile(model, backend=oasis_backend(3, inner="aot_eager"))

    def steps(run, optimizer, numbers):
        for step in numbers:
            run(torch.randn(20, 8, generator=torch.Generator().manual_seed(step))).sin().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(run, optimizer, range(2))
    optimizer.resize_rank(2)
    steps(run, optimizer, range(2, 4))
    twin, its = copy.deepcopy((run, optimizer))
    steps(twin, its, range(4, 6)), steps(run, optimizer, range(4, 6))
    assert torch.equal(twin._orig_mod.weight, model.weight)
    assert its.state[twin._orig_mod.weight]["exp_avg"].shape == (5, 2)


def test_a_shallow_copy_leaves_bases_and_gradients_valid(products) -> None:
    model, optimizer = build(products)
    train(model, optimizer, range(2))
    model(torch.randn(20, 8, dtype=torch.float64)).backward()
    again = copy.copy(optimizer)
    again.step()
    assert again.state is optimizer.state


def test_a_copied_optimizer_keeps_its_count_of_skipped_steps(products) -> None:
    model, optimizer = build(products)
    train(model, optimizer, range(1))
    model.bias.grad = torch.full_like(model.bias, torch.nan)
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert copy.deepcopy(optimizer).num_skipped_steps == through_pickle(optimizer).num_skipped_steps == 1


def test_a_pickle_from_before_some_settings_were_there(products) -> None:
    _, optimizer = build(products)
    state = optimizer.__getstate__()
    for key in ("step_count", "rank_plans", "stochastic_rounding"):
        del state["param_groups"][0][key]
    del state["_skipped"], state["_resized"]
    old = OasisAdamW.__new__(OasisAdamW)
    old.__setstate__(state)
    assert old.param_groups[0]["step_count"] == 0 and old.num_skipped_steps == 0


# States that are cleared, parameters that are others


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_cleared_states_begin_anew_in_the_bases_that_there_are(make, products) -> None:
    model, optimizer = build(products, make)
    train(model, optimizer, range(3))
    basis = STORE.existing(model.q, SPEC).basis.detach().clone()
    twin, fresh = copy.deepcopy((model, optimizer))
    optimizer.state.clear()
    optimizer.state_dict()
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(3)).double()
    model(x).backward()
    assert torch.equal(model.q.grad.basis, basis)
    optimizer.step()
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())
    # As a new optimizer's first step would be.
    fresh.state.clear()
    train(twin, make(twin.named_parameters(), lr=0.02), [3])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_one_state_is_deleted_while_its_fellow_trains_on(products) -> None:
    model, optimizer = build(products)
    train(model, optimizer, range(3))
    del optimizer.state[model.k]
    train(model, optimizer, range(3, 5))
    assert float(optimizer.state[model.k]["step"]) == 2 and float(optimizer.state[model.q]["step"]) == 5


@pytest.mark.parametrize("moved", [False, True], ids=["state left behind", "state moved"])
def test_a_parameter_that_is_replaced_in_its_group(moved, products) -> None:
    """Its state is left behind, as in torch, or handed over by hand, as programs do that prune or grow."""
    model, optimizer = build(products)
    train(model, optimizer, range(3))
    twin = copy.deepcopy((model, optimizer))
    old, new = model.q, torch.nn.Parameter(model.q.detach().clone())
    model.q, optimizer.param_groups[0]["params"][0] = new, new
    if moved:
        optimizer.state[new] = optimizer.state.pop(old)
    train(model, optimizer, range(3, 5)), train(*twin, range(3, 5))
    assert float(optimizer.state[new]["step"]) == (5 if moved else 2)
    if moved:
        assert torch.equal(new, twin[0].q)
    assert set(optimizer.state_dict()["state"]) == {0, 1, 2, 3}
    assert (old in optimizer.state) != moved and isinstance(optimizer.state[new], dict)


def test_a_weight_out_of_its_group_and_back_again_has_kept_up_with_its_basis(products) -> None:
    model, optimizer = build(products)
    optimizer.add_param_group({"params": [("late", torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))]})
    train(model, optimizer, range(3))
    (group,) = [group for group in optimizer.param_groups if model.q in set(group["params"])]
    twin, its = copy.deepcopy((model, optimizer))
    weights, names = list(group["params"]), list(group["param_names"])
    group["params"], group["param_names"] = weights[1:], names[1:]  # without q
    for step in (3, 4):
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for one, other in ((model, optimizer), (twin, its)):
            one(x).backward()
            one.q.grad = None
            other.step()
            other.zero_grad()
    group["params"], group["param_names"] = weights, names
    for one, other in ((model, optimizer), (twin, its)):
        train(one, other, [5])
    assert_alike((model, optimizer), (twin, its))


def test_data_of_another_shape_are_refused_by_name_until_the_state_is_gone() -> None:
    """The kernel would have read and written past the end of the moments."""
    weight = torch.nn.Parameter(torch.ones(6, 4))
    for make in ALL:
        weight.data = torch.ones(6, 4)
        optimizer = make([("w", weight)], lr=0.1)
        weight.grad = torch.ones(6, 4)
        optimizer.step()
        weight.data, before = torch.ones(8, 4), torch.ones(8, 4)
        with pytest.raises(
            ValueError, match=r"w has shape \(8, 4\) and a gradient of shape \(6, 4\): .* since the backw"
        ):
            optimizer.step()
        weight.grad = torch.ones(8, 4)
        with pytest.raises(
            ValueError, match=r"w has shape \(8, 4\) and .* of shape \(6, 4\): .*state\.pop\(parameter\)"
        ):
            optimizer.step()
        assert torch.equal(weight.detach(), before)
        optimizer.state.pop(weight)
        optimizer.step()
        assert not torch.equal(weight.detach(), before)
        weight.grad = None


def test_rows_are_cut_off_a_weight_in_a_subspace(products) -> None:
    model, optimizer = build(products)
    train(model, optimizer, range(2))
    model.o.data, model.bias.data = model.o.data[:1].clone(), model.bias.data[:1].clone()
    with pytest.raises(
        ValueError, match=r"parameter o has shape \(1, 8\) and moments of shape \(5, 3\): its shape has"
    ):
        train(model, optimizer, [2])
    optimizer.zero_grad()
    optimizer.state.pop(model.o), optimizer.state.pop(model.bias)
    train(model, optimizer, range(2, 4))
    assert optimizer.state[model.o]["exp_avg"].shape == (1, 3)
