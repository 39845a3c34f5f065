"""What a checkpoint of our optimizers holds, and how it is checked and taken over.

A weight in a subspace has, beside ``step`` and the optimizer's own states:

    basis [n, r], or basis_code    what the basis is, or is made from (`Rule.coded`)
    basis_updates, basis_steps     how often it moved, and the steps since its last turn to
    basis_seed, basis_error        of rules that draw at random, or feed errors back
    basis_log_rate, basis_move     of a step size that is found during training
    basis_rank                     r of a coded basis
    basis_resizable                False where the rule's bases cannot change their rank
    features                       which dimensions of the weight are n
    exp_avg_scale, ...             where a state is eight-bit codes
    full_rank                      True where the states have the weight's own shape all the same
    subspace                       a number that weights with one basis share

All plain tensors and numbers: `torch.load(weights_only=True)` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import torch

from oasis_fx.graph.matricization import num_features, num_rows
from oasis_fx.runtime.optim.eight_bit import BLOCK
from oasis_fx.runtime.optim.strides import state_layout
from oasis_fx.runtime.subspaces.momentum import Momentum
from oasis_fx.runtime.subspaces.shards import from_checkpoint, full, is_sharded, local, to_checkpoint
from oasis_fx.runtime.subspaces.state import SAVED_KEYS, SubspaceState, basis_dtype
from oasis_fx.runtime.subspaces.store import STORE, SavedSubspace
from oasis_fx.runtime.subspaces.subspace import Subspace

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.algorithm import Algorithm as SubspaceOptimizer


def note_basis(state: dict[str, Any], subspace: Subspace) -> None:
    """Put what a checkpoint needs of the subspace into the state of a weight: shared, and changing with it."""
    if subspace.is_noted_in(state):  # at every step but few
        return
    for key, value in subspace.entries().items():
        if value is not None:
            state[key] = value
        else:
            state.pop(key, None)  # of a subspace under another rule, before


def basis_before(state: dict[str, Any], held: Subspace | None, subspace: Subspace) -> torch.Tensor | None:
    """The basis that the states of a weight are in, which comes under ``subspace`` now; None where it is unknown.

    ``held`` is the subspace that it was in so far; None where a checkpoint was loaded since.
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


def gather_states(optimizer: SubspaceOptimizer, packed: dict[str, Any]) -> dict[str, Any]:
    """The states of sharded weights as DTensors of all rows: what torch.distributed.checkpoint saves and reshards."""
    return _map_states(optimizer, packed, to_checkpoint)


def scatter_states(optimizer: SubspaceOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The other way: of DTensors, or of all rows from a run of one process, the rows of this rank."""
    return _map_states(optimizer, state_dict, from_checkpoint)


def whole_states(optimizer: SubspaceOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The states of sharded weights with all rows, on every rank."""
    return _map_states(optimizer, state_dict, full)


def _map_states(optimizer: SubspaceOptimizer, packed: dict[str, Any], change: Any) -> dict[str, Any]:
    changed = dict(packed["state"])
    for _, weight, saved, _, key in _saved_by_key(optimizer, packed):
        if is_sharded(weight):
            kinds = optimizer.states_of("features" in saved and not saved.get("full_rank"))
            changed[key] = saved | {kind: change(saved[kind], weight) for kind in kinds if kind in saved}
    return {**packed, "state": changed}


def check_state(optimizer: SubspaceOptimizer, state_dict: dict[str, Any], *, live: bool = True) -> None:
    """Raise ValueError where a saved state does not fit its parameter or, with ``live``, its subspace."""
    for name, weight, saved, _ in saved_states(optimizer, state_dict):
        shape = tuple(weight.shape)
        low_rank = "features" in saved and not saved.get("full_rank")
        kinds = optimizer.states_of(low_rank)
        missing = [kind for kind in kinds if kind not in saved]
        if missing:
            raise ValueError(f"parameter {name} has no saved {missing[0]!r}: {type(optimizer).__name__} needs one")
        for kind in kinds:
            _check_kind(name, kind, saved)
        if live and "features" in saved:
            _check_rule(optimizer, name, weight, saved)
        moments = {tuple(saved[kind].shape) for kind in kinds}
        if not low_rank:
            if moments - {shape}:
                raise ValueError(
                    f"parameter {name} has shape {shape}, its saved moments {(moments - {shape}).pop()}, without a "
                    "basis. Of what torch flattens (flatten_optimizer_state_dict=True) it hands an optimizer on what "
                    "that has states for: take one step with the compiled model before you load it"
                )
            continue
        n, rank = _basis_shape(weight, saved, optimizer.states)
        features = tuple(saved["features"])
        m, n_of_weight = num_rows(shape, features), num_features(shape, features)
        misfits = moments - {(m, rank)}
        if n_of_weight != n or misfits:
            raise ValueError(
                f"parameter {name} has shape {shape}, its saved basis {(n, rank)} and moments "
                f"{(misfits or moments).pop()}: "
                f"{(n_of_weight, rank)} and {(m, rank)} would fit"
            )
        present = STORE.all_of(weight) if live else ()
        if present and all(s.spec.rank != rank and s.spec.budget is None for s in present):
            raise ValueError(
                f"parameter {name} trains with a basis of shape {present[0].shape}, the saved one has shape "
                f"{(n, rank)}: make the backend with rank={rank}, or load what resize_checkpoint(state_dict, "
                f"{present[0].spec.rank}) makes of it"
            )


def _check_kind(name: str, kind: str, saved: dict[str, Any]) -> None:
    value, scale = saved[kind], saved.get(f"{kind}_scale")
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"parameter {name} has a saved {kind!r} of type {type(value).__name__}: it must be a tensor")
    if value.is_floating_point() or value.is_complex():
        return
    if value.dtype != torch.uint8 or scale is None or scale.numel() * BLOCK != value.numel():
        raise ValueError(
            f"parameter {name} has a saved {kind!r} of {value.dtype}: it must be of floating point, or eight-bit codes "
            f"with a scale for each {BLOCK}"
        )


def _check_rule(optimizer: SubspaceOptimizer, name: str, weight: torch.Tensor, saved: dict[str, Any]) -> None:
    code, rank = saved.get("basis_code"), _basis_shape(weight, saved, optimizer.states)[1]
    for subspace in STORE.all_of(weight):
        rule = subspace.spec.rule
        if subspace.spec.rank != rank:
            continue
        if rule.coded != (code is not None) or (code is not None and code.shape != rule.first_code(rank, 0).shape):
            raise ValueError(
                f"parameter {name} has a saved basis of another rule than the backend's, {rule.name!r}: make the "
                "backend with the rule of the run that saved it"
            )


def restore_copy(optimizer: SubspaceOptimizer, resized: Iterable[torch.Tensor]) -> None:
    """Give the weights of a copied or unpickled optimizer the bases that its states are in.

    Args:
        resized: those whose rank is not the one that the settings of a backend ask for.
    """
    packed = pack_state(torch.optim.Optimizer.state_dict(optimizer))
    fresh = {key for _, weight, saved, _, key in _saved_by_key(optimizer, packed) if not STORE.all_of(weight)}
    packed["state"] = {key: saved for key, saved in packed["state"].items() if key in fresh}
    restore_state(optimizer, packed, set(resized))


def restore_state(
    optimizer: SubspaceOptimizer, state_dict: dict[str, Any], resized: AbstractSet[torch.Tensor] = frozenset()
) -> None:
    """Take bases over, and low-rank states in the dtype that they were saved in.

    torch's loading, which came before, casts states to the dtype of the parameter.

    Args:
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
    optimizer: SubspaceOptimizer, group: Mapping[str, Any], weight: torch.Tensor, saved: dict[str, Any]
) -> SubspaceState:
    """Return the saved state of a subspace; give the state of its weight the dtypes that it trains with."""
    state, wide, low_rank = optimizer.state[weight], basis_dtype(weight.dtype), not saved.get("full_rank")
    found = SubspaceState.from_entries(saved, _basis_shape(weight, saved, optimizer.states), wide, weight.device)
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


def _part(optimizer: SubspaceOptimizer, state_dict: dict[str, Any]) -> bool:
    """Take weights out of subspaces that they share here, and did not in the run that was saved.

    So it is where layers were unfrozen one after another: each has got a basis of its own then.
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
    """What torch has loaded, laid out as a state of the weight, and in no memory that the checkpoint goes on using."""
    laid_out = state_layout(loaded, weight) if loaded.shape == weight.shape else loaded
    same = laid_out.device == saved.device and laid_out.data_ptr() == saved.data_ptr()
    return laid_out.clone() if same else laid_out


def _basis_shape(weight: torch.Tensor, saved: dict[str, Any], states: tuple[str, ...]) -> tuple[int, int]:
    if "basis" in saved:
        return saved["basis"].shape[0], saved["basis"].shape[1]
    rank = saved.get("basis_rank", saved[states[0]].shape[1])  # checkpoints from before it was saved have none
    return num_features(weight.shape, tuple(saved["features"])), int(rank)


def saved_states(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor, dict[str, Any], dict[str, Any]]]:
    """(name, parameter, saved state, saved group) for each parameter that has one; torch checks the groups itself."""
    return (found[:4] for found in _saved_by_key(optimizer, state_dict))


def _saved_by_key(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor, dict[str, Any], dict[str, Any], Any]]:
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=False)):
        for number, (weight, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
            if key in state_dict["state"]:
                name = group["param_names"][number] if "param_names" in group else f"{number} of group {index}"
                yield name, weight, state_dict["state"][key], saved, key
