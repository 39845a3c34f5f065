"""`torch.distributed.checkpoint.state_dict` in one process: whole, offloaded and flattened states."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from oasis_fx import OasisAdamW, OasisSGD, oasis_backend
from oasis_fx.runtime.subspaces.rules import Oja, Random

OPTIONS = {
    "plain": {},
    "whole": {"full_state_dict": True},
    "offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
}


class Shared(torch.nn.Module):
    """``a`` and ``b`` share a basis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = torch.nn.Linear(8, 12), torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    def forward(self, x):
        return self.c(torch.tanh(self.a(x)) * self.b(x))


def made(backend, optimizer):
    torch.manual_seed(0)
    model = Shared()
    model.compile(backend=backend)  # one graph for all models
    return model, optimizer(model.parameters(), lr=1e-2)


def train(run, optimizer, steps) -> None:
    for step in steps:
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        (run(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(OasisAdamW, {"subspace": Oja(lr="auto")}), (OasisSGD, {"subspace": Random(every=2)})],
    ids=["auto", "random"],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(optimizer, settings, recwarn) -> None:
    backend = oasis_backend(rank=4, exclude=[], inner="aot_eager", **settings)
    for name, options in OPTIONS.items():
        flags = StateDictOptions(**options)
        for begun in (False, True):
            model, steps = made(backend, optimizer)
            train(model, steps, range(3))
            weights = copy.deepcopy(model.state_dict())
            saved = copy.deepcopy(get_optimizer_state_dict(model, steps, options=flags))
            train(model, steps, range(3, 7))
            other, resumed = made(backend, optimizer)
            if begun:
                train(other, resumed, range(8, 9))
            other.load_state_dict(weights)
            if name == "flat" and not begun:  # it hands on what the optimizer has states for, and it has no basis yet
                with pytest.raises(ValueError, match="take one step with the compiled model before you load it"):
                    set_optimizer_state_dict(other, resumed, saved, options=flags)
                continue
            set_optimizer_state_dict(other, resumed, saved, options=flags)
            train(other, resumed, range(3, 7))
            assert_equal(model, other, steps, resumed, name)
    assert not [w for w in recwarn if "none of the" in str(w.message)], "a step of length 0 is no training step"


OLD = {"step_count": "rounding_seed", "step_outside_subspace": "residual", "full_size_states": "full_rank"}


@pytest.mark.parametrize("name", ["plain", "whole", "offloaded"])
def test_groups_of_0_2_are_loaded_under_their_present_names(name) -> None:
    """Torch itself wants the names that the optimizer has, where it is to load a whole or a flat state dict."""
    backend = oasis_backend(rank=4, exclude=[], inner="aot_eager")
    model, steps = made(backend, OasisAdamW)
    train(model, steps, range(3))
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, steps, options=StateDictOptions(**OPTIONS[name])))
    (group,) = saved["param_groups"]
    for new, old in OLD.items():
        group[old] = group.pop(new)
    train(model, steps, range(3, 7))
    other, resumed = made(backend, OasisAdamW)
    other.load_state_dict(weights)
    if name != "plain":
        with pytest.raises(KeyError, match="rounding_seed"):
            set_optimizer_state_dict(other, resumed, saved, options=StateDictOptions(**OPTIONS[name]))
    with pytest.warns(DeprecationWarning, match="'residual', which is called 'step_outside_subspace' since 0.3"):
        set_optimizer_state_dict(other, resumed, saved)
    (loaded,) = resumed.param_groups
    assert [loaded[new] for new in OLD] == [3, False, False] and not loaded.keys() & set(OLD.values())
    train(other, resumed, range(3, 7))
    assert_equal(model, other, steps, resumed, name)


def assert_equal(model, other, steps, resumed, name) -> None:
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another), name
    for one, another in zip(steps.state.values(), resumed.state.values(), strict=True):
        for key in ("exp_avg", "momentum_buffer", "basis", "basis_code", "basis_updates", "basis_steps"):
            assert key not in one or torch.equal(one[key], another[key]), (name, key)
    shared = {resumed.bindings[layer.weight].subspace for layer in (other.a, other.b)}
    assert len(shared) == 1, (name, "weights that shared a basis do not any more")
