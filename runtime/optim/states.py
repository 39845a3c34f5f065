"""What a checkpoint of our optimizers holds: the entries of a weight's state, written and read.

A weight in a subspace has, beside ``step`` and the optimizer's own states:

    basis [n, r], or basis_code    what the basis is, or is made from (`Rule.coded`)
    basis_updates, basis_steps     how often it moved, and the steps since its last turn to
    basis_seed, basis_error        of rules that draw at random, or feed errors back
    basis_tail, basis_tails        the columns of its tail [n, t], and how often they were drawn
    basis_log_rate, basis_move     of a step size that is found during training
    basis_rank                     r of a coded basis
    basis_resizable                False where the rule's bases cannot change their rank
    features                       which dimensions of the weight are n
    exp_avg_scale, ...             where a state is eight-bit codes
    full_rank                      True where the states have the weight's own shape all the same
    subspace                       a number that weights with one basis share

All plain tensors and numbers: `torch.load(weights_only=True)` reads them. Keys are the format of every checkpoint there
is, so ``full_rank`` keeps its name here, though the setting behind it is called ``full_size_states`` since 0.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from oasis_fx.graph.matricization import num_features
from oasis_fx.runtime.subspaces.shards import from_checkpoint, full, is_sharded, to_checkpoint
from oasis_fx.runtime.subspaces.subspace import Subspace

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.algorithm import Algorithm


def note_basis(state: dict[str, Any], subspace: Subspace) -> None:
    """Put what a checkpoint needs of a subspace into the state of a weight; its tensors change with the subspace."""
    if subspace.is_noted_in(state):  # at every step but few
        return
    for key, value in subspace.entries().items():
        if value is not None:
            state[key] = value
        else:
            state.pop(key, None)  # of a subspace under another rule, before


def basis_before(state: dict[str, Any], held: Subspace | None, subspace: Subspace) -> torch.Tensor | None:
    """Return the basis Q [n, r] that the states of a weight are in, before they go over to another subspace.

    Args:
        state: of the weight.
        held: the subspace that the weight was in so far; None where a checkpoint was loaded since.
        subspace: the one that it goes over to, whose device and dtype the basis gets.

    Returns:
        The basis, or None where it is unknown: the state holds none, or the code of another rule.
    """
    if held is not None:
        return held.basis.detach().to(subspace.device, subspace.dtype)
    if "basis" in state:
        return state["basis"].to(subspace.device, subspace.dtype)  # type: ignore[no-any-return]
    code, rule = state.get("basis_code"), subspace.spec.rule
    if code is None or not rule.coded:
        return None
    return rule.expand(code, *subspace.shape, subspace.dtype, subspace.device)


def pack_state(packed: dict[str, Any]) -> dict[str, Any]:
    """Number the bases in a state dict of torch's, so that sharing survives formats that copy each tensor."""
    numbers: dict[int, int] = {}
    state = {}
    for key, entry in packed["state"].items():
        if isinstance(entry, dict) and "features" in entry:
            number = numbers.setdefault(entry["basis_updates"].data_ptr(), len(numbers))
            # Last, whether the live state has one or not: a resumed run writes what the uninterrupted one does.
            entry = {key: value for key, value in entry.items() if key != "subspace"} | {"subspace": number}
        state[key] = entry
    return {**packed, "state": state}


def gather_states(optimizer: Algorithm, packed: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict whose states of sharded weights are DTensors, as torch.distributed.checkpoint wants them."""
    return _map_states(optimizer, packed, to_checkpoint)


def scatter_states(optimizer: Algorithm, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict whose states of sharded weights have the rows of this rank alone.

    They may come as DTensors, or with all rows from a run of one process.
    """
    return _map_states(optimizer, state_dict, from_checkpoint)


def whole_states(optimizer: Algorithm, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict whose states of sharded weights have all rows, on every rank."""
    return _map_states(optimizer, state_dict, full)


def _map_states(optimizer: Algorithm, packed: dict[str, Any], change: Any) -> dict[str, Any]:
    changed = dict(packed["state"])
    for _, weight, saved, _, key in saved_by_key(optimizer, packed):
        if is_sharded(weight):
            kinds = optimizer.states_of("features" in saved and not saved.get("full_rank"))
            changed[key] = saved | {kind: change(saved[kind], weight) for kind in kinds if kind in saved}
    return {**packed, "state": changed}


def basis_shape(weight: torch.Tensor, saved: dict[str, Any], states: tuple[str, ...]) -> tuple[int, int]:
    """Return (n, r) of the basis that a saved state is in.

    Args:
        weight: whose state it is.
        saved: the state, with ``features``.
        states: names of the optimizer's states, whose columns say what r is where nothing else does.
    """
    if "basis" in saved:
        return saved["basis"].shape[0], saved["basis"].shape[1]
    rank = saved.get("basis_rank", saved[states[0]].shape[1])  # checkpoints from before it was saved have none
    return num_features(weight.shape, tuple(saved["features"])), int(rank)


def saved_states(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor, dict[str, Any], dict[str, Any]]]:
    """Yield (name, parameter, saved state, saved group) for each parameter that has a saved state.

    Groups that differ in length are left to torch, which refuses them.
    """
    return (found[:4] for found in saved_by_key(optimizer, state_dict))


def saved_by_key(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor, dict[str, Any], dict[str, Any], Any]]:
    """Yield what `saved_states` yields, and the key under which the state dict has the state."""
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=False)):
        for number, (weight, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
            if key in state_dict["state"]:
                name = group["param_names"][number] if "param_names" in group else f"{number} of group {index}"
                yield name, weight, state_dict["state"][key], saved, key
