"""A model that is moved or cast in the midst of training: its subspaces lose nothing."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.runtime.subspaces.momentum import Momentum
from oasis_fx.runtime.subspaces.rules import GradientPower, rule_of
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.state import SubspaceState
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace

FIELDS = {field.name: field.metadata for field in fields(SubspaceState)}
SIZES = {"statistic": (6, 3), "overlap": (3, 3), "error": (5, 6), "last_move": (4, 3), "tail": (6, 2)}
# What belongs to the object, and not to the state.
OWN = {"spec", "handle", "energy", "latest_move", "_num_recoded"}
GIVEN = {"shape", "dtype", "device", "stored_basis", "code"}


def full_subspace(weight: torch.nn.Parameter, rule: str) -> Subspace:
    """One in which no attribute has its first value."""
    statistic = rule.endswith("oja")
    spec = SubspaceSpec(3, rule_of(rule, lr="auto" if statistic else None), tail=2 if rule == "oja" else 0)
    subspace = STORE.resolve([weight], spec, [(1, 2)])
    made = iter(torch.randn(40, generator=torch.Generator().manual_seed(1)))
    for name in FIELDS.keys() - GIVEN - {"family"}:
        value = getattr(subspace, name)
        if name == "tail" and not spec.tail:
            continue
        if name == "names":
            subspace.names = ("a.weight",)
        elif name == "replicas":
            subspace.replicas = frozenset({0, 1})
        elif name == "momentum":
            subspace.momentum = Momentum(torch.randn(5, 3), torch.tensor(4.0), 0.9)
        elif isinstance(value, bool):
            setattr(subspace, name, not value)
        elif isinstance(value, int):
            setattr(subspace, name, value + 7)
        elif FIELDS[name].get("kind") == "count" or name == "num_stuck":
            value.add_(3)
        else:
            assert value is None or value.is_floating_point(), f"{name} is new: give it a value here"
            setattr(subspace, name, torch.full(SIZES.get(name, ()), float(next(made))))
    return subspace


def assert_same(name: str, found, was, dtype: torch.dtype) -> None:
    if isinstance(was, Momentum):
        assert (found.beta, float(found.step)) == (was.beta, float(was.step)) and found.mean.dtype == dtype
        torch.testing.assert_close(found.mean, was.mean.to(dtype))
    elif isinstance(was, torch.Tensor):
        torch.testing.assert_close(found.double(), was.double(), rtol=1e-6, atol=1e-7, msg=name)
        assert found.dtype == (dtype if was.is_floating_point() else was.dtype), name
    else:
        assert found is was or found == was, name


def test_whatever_a_subspace_has_is_a_field_of_its_state() -> None:
    """So nothing that is added to it later can be left behind by a cast, a checkpoint or another rank."""
    subspace = STORE.resolve([torch.nn.Parameter(torch.randn(5, 6))], SubspaceSpec(3), [(1, 2)])
    assert set(vars(subspace)) - set(FIELDS) == OWN
    for name, metadata in FIELDS.items():
        assert {"of_rank", "on_cpu"} <= set(metadata), f"{name}: what becomes of it under another rank?"
        assert metadata.get("key", "basis").startswith("basis"), name


@pytest.mark.parametrize("rule", ["oja", "random"])
def test_every_attribute_of_a_subspace_is_taken_along(rule) -> None:
    weight = torch.nn.Parameter(torch.randn(5, 6))
    subspace = full_subspace(weight, rule)
    weight.data = weight.data.double()
    moved = STORE.resolve([weight], subspace.spec, [(1, 2)])
    assert moved is not subspace and moved.dtype == torch.float64
    torch.testing.assert_close(moved.basis.detach(), subspace.basis.detach().double(), rtol=1e-6, atol=1e-7)
    for name in FIELDS.keys() - {"dtype"}:
        assert_same(name, getattr(moved, name), getattr(subspace, name), torch.float64)


@pytest.mark.parametrize("rule", ["oja", "random"])
def test_every_saved_attribute_is_in_the_entries_and_comes_out_of_them(rule) -> None:
    """Into a new state, and into a live subspace, whose basis stays where it is."""
    subspace = full_subspace(torch.nn.Parameter(torch.randn(5, 6)), rule)
    # Only rules that use them show these.
    entries = subspace.entries() | {
        "basis_seed": subspace.seed,
        "basis_log_rate": subspace.log_rate,
        "basis_tails": subspace.num_tails,
    }
    found = SubspaceState.from_entries(entries, subspace.shape, torch.float64, subspace.device)
    weight = torch.nn.Parameter(torch.randn(5, 6, dtype=torch.float64))
    live = STORE.resolve([weight], subspace.spec, [(1, 2)])
    live.overlap = live.statistic = torch.ones(6, 3, dtype=torch.float64)
    live.has_pending_move = True
    version, address = live.version, None if live.stored_basis is None else live.stored_basis.data_ptr()
    live.load(found)
    assert live.version != version and live.overlap is None and live.statistic is None
    assert not live.has_pending_move
    assert address == (None if live.stored_basis is None else live.stored_basis.data_ptr())
    for name, metadata in FIELDS.items():
        if "key" in metadata:
            for state in (found, live):
                assert_same(name, getattr(state, name), getattr(subspace, name), torch.float64)


def test_every_attribute_but_those_of_the_rank_outlives_it() -> None:
    subspace = full_subspace(torch.nn.Parameter(torch.randn(5, 6)), "oja")
    before, basis = SubspaceState((6, 2), subspace.dtype, subspace.device), torch.randn(6, 2)
    after = subspace.resized(basis)
    assert after.shape == (6, 2) and after.stored_basis is basis and after.num_updates is not subspace.num_updates
    for name in FIELDS.keys() - {"shape", "stored_basis", "family"}:
        expected = before if FIELDS[name]["of_rank"] else subspace
        if isinstance(value := getattr(expected, name), torch.Tensor):
            torch.testing.assert_close(getattr(after, name), value, equal_nan=True, msg=name)
        else:
            assert getattr(after, name) == value, name


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 5, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def batch(step: int) -> torch.Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize(
    "rule", ["oja", "random", "gradient_power", GradientPower(error_feedback=True), "gradient_oja", "dct"], ids=str
)
def test_a_model_cast_in_the_midst_trains_on_as_one_that_was_not(rule) -> None:
    """From float32 to float64: the steps after it are those of a run in float32, but for its rounding."""
    ends = []
    for cast_after in (None, 3):
        torch._dynamo.reset()
        torch.manual_seed(3)
        model = Net()
        finding = rule_of(rule, lr="auto") if rule in ("oja", "gradient_oja") else rule
        compiled = torch.compile(model, backend=oasis_backend(3, subspace=finding, inner="aot_eager"))
        optimizer = OasisAdamW(model.parameters(), lr=1e-2)
        for step in range(6):
            if step == cast_after:
                model.double()
            (compiled(batch(step).to(model.up.weight.dtype)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().double() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_another_checkpoint_has_replaced_is_noted_again() -> None:
    """Two optimizers may have weights in one subspace: loading a state dict of one replaces the seed for both."""
    weight = torch.nn.Parameter(torch.randn(5, 6))
    subspace = STORE.resolve([weight], SubspaceSpec(3, rule_of("principal_random")), [(1, 2)])
    noted = {key: value for key, value in subspace.entries().items() if value is not None}
    assert subspace.is_noted_in(noted)
    subspace.seed += 1
    assert not subspace.is_noted_in(noted)
    noted["basis_seed"] = subspace.seed
    assert subspace.is_noted_in(noted)
    subspace.code = torch.zeros(1, dtype=torch.int64)
    assert not subspace.is_noted_in(noted)
