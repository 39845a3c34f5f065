"""Store the numbers of a saved state as tensors of one dimension.

`torch.distributed.checkpoint.state_dict` passes on what it finds, with two exceptions. With ``full_state_dict`` it
fails at numbers, and at tensors without dimensions, that the optimizer does not have yet by itself; with
``flatten_optimizer_state_dict`` it fails at tuples. A state dict of ours has none of these but what torch's AdamW has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from oasis_fx.runtime.subspaces.state import SAVED_FIELDS

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.algorithm import Algorithm

_KINDS = {f.metadata["key"]: f.metadata["kind"] for f in SAVED_FIELDS}
_NUMBERS = ("subspace", "full_rank", "basis_rank", "basis_resizable", *(k for k in _KINDS if _KINDS[k] == "number"))
_SCALARS = tuple(key for key, kind in _KINDS.items() if kind in ("count", "scalar"))


def pack_numbers(packed: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict in which all numbers that are ours are tensors [1], on the device of their parameter."""
    return _map_entries(packed, _pack)


def unpack_numbers(optimizer: Algorithm, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict in which what `pack_numbers` made tensors of is numbers again.

    One that was never packed, as those of earlier versions, stays as it is. One that torch has flattened holds only
    what the optimizer had states for, so that the number of the subspace may be missing: weights then share a basis
    where they share one now.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        return state_dict  # what loads it says so
    unpacked = _map_entries(state_dict, _unpack)
    for group, saved in zip(optimizer.param_groups, unpacked["param_groups"], strict=False):
        for number, (weight, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
            entry = unpacked["state"].get(key)
            if isinstance(entry, dict) and "features" in entry and "subspace" not in entry:
                binding = optimizer.bindings.get(weight)
                unknown = -1 - number if binding is None else binding.subspace.handle
                unpacked["state"][key] = {**entry, "subspace": unknown}
    return unpacked


def _map_entries(state_dict: dict[str, Any], change: Any) -> dict[str, Any]:
    state = {
        key: change(entry) if isinstance(entry, dict) and "features" in entry else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _pack(entry: dict[str, Any]) -> dict[str, Any]:
    packed, device = dict(entry), entry["basis_updates"].device
    packed["features"] = torch.tensor(tuple(entry["features"]), device=device)
    for key in (*_NUMBERS, *_SCALARS):
        if key in entry:
            packed[key] = torch.as_tensor(entry[key]).reshape(1).to(device)
    if "basis_code" in entry:
        packed["basis_code"] = entry["basis_code"].to(device)
    return packed


def _unpack(entry: dict[str, Any]) -> dict[str, Any]:
    unpacked = dict(entry)
    unpacked["features"] = tuple(int(dim) for dim in entry["features"])
    for key in _NUMBERS:
        if isinstance(entry.get(key), torch.Tensor):
            unpacked[key] = entry[key].item()
    for key in _SCALARS:
        if isinstance(entry.get(key), torch.Tensor):
            unpacked[key] = entry[key].reshape(())
    return unpacked
