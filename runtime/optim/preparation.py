"""Bring the state of a parameter to where a step needs it: begun, on its device, in the coordinates of its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from oasis_fx.graph.matricization import Features, num_rows
from oasis_fx.runtime.optim.algorithm import Algorithm
from oasis_fx.runtime.optim.coordinates import transport_to_present
from oasis_fx.runtime.optim.items import Item
from oasis_fx.runtime.optim.states import note_basis
from oasis_fx.runtime.optim.strides import state_layout
from oasis_fx.runtime.optim.updates import State, is_low_rank
from oasis_fx.runtime.subspaces.shards import local
from oasis_fx.runtime.subspaces.state import basis_dtype


def prepare_state(optimizer: Algorithm, item: Item) -> None:
    """Begin the state of a parameter, or bring it to where this step needs it."""
    state, subspace = optimizer.state[item.weight], item.subspace
    if not state:
        _begin(optimizer, state, item)
    else:
        _match_weight(optimizer, item.weight, state)
        if item.low_rank and not is_low_rank(state):
            assert subspace is not None and item.features is not None
            _project(optimizer, state, subspace.basis.detach(), item.features, item.group)
    if subspace is None:
        return
    binding = optimizer.bindings.get(item.weight)
    if binding is not None and binding.subspace is subspace and binding.version == subspace.version:
        return  # as the last step left it
    if item.low_rank:
        transport_to_present(optimizer, item.weight, state, subspace)
    else:
        state["full_rank"] = True
    note_basis(state, subspace)
    state["features"], state["subspace"] = item.features, subspace.handle
    optimizer.bind(item.weight, subspace)


def _begin(optimizer: Algorithm, state: State, item: Item) -> None:
    like = item.data
    if item.low_rank:
        assert item.subspace is not None and item.features is not None
        shape = num_rows(item.data.shape, item.features), item.subspace.shape[1]
        like = torch.empty(shape, dtype=item.subspace.dtype, device=item.weight.device)
    state["step"] = torch.zeros((), dtype=torch.float32, device=item.weight.device)
    for name in optimizer.states_of(item.low_rank):
        state.update(optimizer.new_state(name, like, item.group))


def _project(
    optimizer: Algorithm, state: State, basis: torch.Tensor, features: Features, group: Mapping[str, Any]
) -> None:
    """Project states of the weight's own shape to the coordinates of a basis Q [n, r].

    It happens where a weight comes into a subspace after its first steps: they were eager, or the checkpoint is that of
    a stock optimizer.
    """
    projected = optimizer.projected_states(optimizer.decoded(state), basis, features, group)
    for name in optimizer.states_of(False):
        state.pop(name, None)
        state.pop(f"{name}_scale", None)
    for name, value in projected.items():
        state.update(optimizer.new_state(name, value, group))
    with optimizer.states_in_place([state]) as (plain,):
        for name, value in projected.items():
            plain[name].copy_(value)


def _match_weight(optimizer: Algorithm, weight: torch.Tensor, state: State) -> None:
    """Move and cast a state to the device and dtype of its weight, which `model.to()` may have changed."""
    low_rank, device = is_low_rank(state), weight.device
    wide = basis_dtype(weight.dtype)
    for key in (*optimizer.states_of(low_rank), "basis"):
        if key not in state:
            continue
        found: torch.Tensor = state[key]
        if f"{key}_scale" in state:  # codes of numbers
            state[key], state[f"{key}_scale"] = found.to(device), state[f"{key}_scale"].to(device)
            continue
        dtype = wide if key == "basis" or low_rank else weight.dtype
        if found.dtype != dtype or found.device != device:
            state[key] = found = found.to(device, dtype)
        if key != "basis" and not low_rank:
            data = local(weight)
            if found.shape == data.shape:
                state[key] = state_layout(found, data)
    if "step" in state and state["step"].device != device:
        state["step"] = state["step"].to(device)
