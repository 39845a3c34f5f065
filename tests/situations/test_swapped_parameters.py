"""Conversions that swap the contents of parameters find no weak reference of ours in their way, and lose no basis."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.runtime.subspaces.store import STORE


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def trained(kit, swap: bool) -> torch.nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(swap)
    torch.compiler.reset()
    model = kit.Net()
    compiled = torch.compile(model, backend=oasis_backend(rank=3, inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    conversions = [
        lambda: model.to(torch.float32),
        lambda: model.double(),
        lambda: model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}),
        lambda: None,
    ]
    for seed, convert in enumerate(conversions):
        dtype = next(model.parameters()).dtype
        kit.backward(compiled, kit.batch(seed).to(dtype))
        assert all(isinstance(w.grad, LowRankGrad) for w in model.parameters() if w.dim() == 2)
        optimizer.step()
        optimizer.zero_grad()
        convert()
    return model


def test_training_goes_on_as_without_the_flag(kit, swapping) -> None:
    models = trained(kit, False), trained(kit, True)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
        for mine, theirs in zip(STORE.all_of(one), STORE.all_of(other), strict=True):
            assert torch.equal(mine.basis, theirs.basis)


def test_an_entry_belongs_to_the_tensor_object(kit) -> None:
    model = kit.Net()
    kit.backward(torch.compile(model, backend=oasis_backend(rank=3, inner="aot_eager")), kit.batch())
    weight, other = model.blocks[0].up.weight, torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.float64))
    model.zero_grad()
    (subspace,) = STORE.all_of(weight)
    torch.utils.swap_tensors(weight, other)
    assert not weight.any() and other.any()
    assert STORE.all_of(weight) == (subspace,) and STORE.all_of(other) == ()


def test_a_refused_swap_leaves_the_entries(kit) -> None:
    model = kit.Net()
    kit.backward(torch.compile(model, backend=oasis_backend(rank=3, inner="aot_eager")), kit.batch())
    weight, other = model.blocks[0].up.weight, torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.float64))
    foreign = weakref.ref(weight)
    (subspace,) = STORE.all_of(weight)
    with pytest.raises(RuntimeError, match="has weakref"):
        torch.utils.swap_tensors(weight, other)
    assert STORE.all_of(foreign()) == (subspace,)


def test_a_deleted_parameter_takes_its_entry_with_it() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    gc.collect()  # entries of parameters that earlier tests have left go first
    before = len(STORE._resized)
    STORE._resized[weight] = {}
    torch.utils.swap_tensors(weight, torch.nn.Parameter(torch.zeros(2, 3)))
    assert len(STORE._resized) == before + 1
    del weight
    gc.collect()
    assert len(STORE._resized) == before
