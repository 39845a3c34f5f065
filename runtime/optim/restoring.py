"""Give weights back what a checkpoint or a copied optimizer holds: their states, and the subspaces of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import torch

from oasis_fx.runtime.optim.states import basis_shape, pack_state, saved_by_key, saved_states
from oasis_fx.runtime.optim.strides import state_layout
from oasis_fx.runtime.subspaces.momentum import Momentum
from oasis_fx.runtime.subspaces.saved import SavedSubspace
from oasis_fx.runtime.subspaces.shards import local
from oasis_fx.runtime.subspaces.state import SAVED_KEYS, SubspaceState, basis_dtype
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.algorithm import Algorithm


def restore_copy(optimizer: Algorithm, resized: Iterable[torch.Tensor]) -> None:
    """Give the weights of a copied or unpickled optimizer the bases that its states are in.

    Weights that are in a subspace already stay there.

    Args:
        resized: weights whose rank is not the one that the settings of a backend ask for.
    """
    packed = pack_state(torch.optim.Optimizer.state_dict(optimizer))
    fresh = {key for _, weight, saved, _, key in saved_by_key(optimizer, packed) if not STORE.all_of(weight)}
    packed["state"] = {key: saved for key, saved in packed["state"].items() if key in fresh}
    restore_state(optimizer, packed, set(resized))


def restore_state(
    optimizer: Algorithm, state_dict: dict[str, Any], resized: AbstractSet[torch.Tensor] = frozenset()
) -> None:
    """Take over the bases and the states of a checkpoint, each in the dtype that it trains in.

    torch's own loading, which comes before, has cast states to the dtype of the parameter. Where weights leave
    subspaces that they share here, or come back at another rank, graphs are recompiled (`torch.compiler.reset`).

    Args:
        optimizer: into which torch has loaded the state dict.
        state_dict: checked by `oasis_fx.runtime.optim.state_checks.check_state`.
        resized: weights for which the saved rank counts, and not the one that a backend asks for.
    """
    recompile = _part(optimizer, state_dict)
    load = object()  # one load's subspace numbers mean nothing to another
    groups = {weight: group for group in optimizer.param_groups for weight in group["params"]}
    for _, weight, saved, _ in saved_states(optimizer, state_dict):
        state = optimizer.state[weight]
        for key, value in saved.items():
            if f"{key}_scale" in saved:  # codes, of which torch has made floating point numbers
                state[key] = value.to(weight.device, copy=True)
                state[f"{key}_scale"] = saved[f"{key}_scale"].to(weight.device, torch.float32, copy=True)
            elif key in state and isinstance(value, torch.Tensor):
                state[key] = _own_copy(state[key], value, local(weight))
            elif isinstance(value, str):  # torch takes it for a sequence of values
                state[key] = value
        if "features" in saved:
            found = _load_subspace(optimizer, groups[weight], weight, saved)
            resizable = bool(saved.get("basis_resizable", found.code is None))
            group = load, saved["subspace"]
            known = SavedSubspace(found, tuple(saved["features"]), group, weight in resized, resizable)
            recompile |= STORE.load(weight, known)
    if recompile:
        torch.compiler.reset()


def _load_subspace(
    optimizer: Algorithm, group: Mapping[str, Any], weight: torch.Tensor, saved: dict[str, Any]
) -> SubspaceState:
    """Return the saved state of a subspace; give the state of its weight the dtypes that it trains with."""
    state, wide, low_rank = optimizer.state[weight], basis_dtype(weight.dtype), not saved.get("full_rank")
    found = SubspaceState.from_entries(saved, basis_shape(weight, saved, optimizer.states), wide, weight.device)
    state.update((key, getattr(found, name)) for name, key in SAVED_KEYS.items() if key in saved)
    for key, value in saved.items():
        own = low_rank and not key.startswith("basis") and key != "step" and not key.endswith("_scale")
        if own and isinstance(value, torch.Tensor) and value.is_floating_point():
            state[key] = value.detach().to(device=weight.device, dtype=wide, copy=True)
    state["features"] = tuple(saved["features"])  # a list, where the checkpoint went through JSON
    state.pop("subspace", None)
    if low_rank and optimizer.mean_state is not None:
        found.momentum = Momentum(state[optimizer.mean_state], state["step"], optimizer.mean_decay(group))
    return found


def _part(optimizer: Algorithm, state_dict: dict[str, Any]) -> bool:
    """Take weights out of subspaces that they share here and did not share in the run that was saved.

    That is the case where layers were unfrozen one after another: each then has a basis of its own.

    Returns:
        Whether there were any.
    """
    numbers = {weight: saved.get("subspace") for _, weight, saved, _ in saved_states(optimizer, state_dict)}
    members: dict[Subspace, dict[Any, list[torch.Tensor]]] = {}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            for subspace in STORE.all_of(weight):
                members.setdefault(subspace, {}).setdefault(numbers.get(weight), []).append(weight)
    parted = False
    for by_number in members.values():
        kept = next((number for number in by_number if number is not None), None)
        for number, weights in by_number.items():
            if number != kept:
                parted = True
                for weight in weights:
                    STORE.forget(weight)
    return parted


def _own_copy(loaded: torch.Tensor, saved: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a state that torch has loaded, laid out as one of the weight, in memory of its own."""
    laid_out = state_layout(loaded, weight) if loaded.shape == weight.shape else loaded
    same = laid_out.device == saved.device and laid_out.data_ptr() == saved.data_ptr()
    return laid_out.clone() if same else laid_out
