"""What a checkpoint of `OasisAdamW` holds, and how it is checked and taken over.

A weight in a subspace has, beside torch's ``step``, ``exp_avg`` and ``exp_avg_sq``: ``basis`` [n, r],
``basis_updates`` (how often it moved), ``basis_steps`` (steps since its last turn to move), ``features`` (which of
its dimensions are n), and ``subspace``, a number that weights with one basis share. All plain tensors and numbers:
`torch.load(weights_only=True)` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from oasis_fx.runtime.layout import num_features, num_rows
from oasis_fx.runtime.store import STORE


def pack_state(packed: dict[str, Any]) -> dict[str, Any]:
    """Number the bases in a state dict of torch's, so that sharing survives formats that copy each tensor."""
    numbers: dict[int, int] = {}
    state = {}
    for key, entry in packed["state"].items():
        if "basis" in entry:
            number = numbers.setdefault(entry["basis"].data_ptr(), len(numbers))
            entry = {**entry, "subspace": number}
        state[key] = entry
    return {**packed, "state": state}


def check_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Raise ValueError where a saved state does not fit its parameter; change nothing."""
    for name, weight, saved in _saved_states(optimizer, state_dict):
        moments, shape = tuple(saved["exp_avg"].shape), tuple(weight.shape)
        if "basis" not in saved:
            if moments != shape:
                raise ValueError(f"parameter {name} has shape {shape}, its saved moments {moments}")
            continue
        n, rank = saved["basis"].shape
        features = tuple(saved["features"])
        m, n_of_weight = num_rows(shape, features), num_features(shape, features)
        if (n_of_weight, (m, rank)) != (n, moments):
            raise ValueError(
                f"parameter {name} has shape {shape}, its saved basis {(n, rank)} and moments {moments}: "
                f"{(n_of_weight, rank)} and {(m, rank)} would fit"
            )
        live = STORE.ranks(weight)
        if live and rank not in live:
            raise ValueError(
                f"parameter {name} trains with a basis of shape {(n, live[0])}, the saved one has shape {(n, rank)}: "
                f"make the backend with rank={rank}"
            )


def restore_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Take bases over, and low-rank moments in the dtype that they were saved in.

    torch's loading, which came before, casts moments to the dtype of the parameter.
    """
    load = object()  # one load's subspace numbers mean nothing to another
    for _, weight, saved in _saved_states(optimizer, state_dict):
        if "basis" not in saved:
            continue
        state = optimizer.state[weight]
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        for key in ("exp_avg", "exp_avg_sq", "basis"):
            state[key] = saved[key].detach().to(device=weight.device, dtype=wide, copy=True)
        updates = int(saved["basis_updates"])
        steps = int(saved.get("basis_steps", 0))  # checkpoints from before `subspace_every` have none
        STORE.preload(weight, state["basis"], updates, (load, saved["subspace"]), steps)
        state["basis_steps"] = torch.tensor(steps)
        state["basis_updates"] = torch.tensor(updates, device=weight.device)
        state["features"] = tuple(saved["features"])  # a list, where the checkpoint went through JSON
        del state["subspace"]


def _saved_states(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """(name, parameter, saved state) for each parameter that has one; torch checks the groups itself."""
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=False)):
        for number, (weight, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
            if key in state_dict["state"]:
                name = group["param_names"][number] if "param_names" in group else f"{number} of group {index}"
                yield name, weight, state_dict["state"][key]
