"""Turn what `load_state_dict` is given into what our optimizers keep, or refuse it before anything has changed.

A checkpoint may be one of ours, of any age, or of the optimizer of torch's that has the same states: AdamW's for
`OasisAdamW` (and what `OasisMuon` steps by AdamW), SGD's for `OasisSGD`. Moments of torch's have the weight's shape and
stay so, until a gradient comes in a subspace.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from oasis_fx.errors import OasisWarning
from oasis_fx.runtime.optim.group_settings import as_number, parameter_name, rename_settings

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.algorithm import Algorithm

# Settings of torch's optimizers that change what a step does, and that ours do not have: the value that is none.
_WITHOUT = {"amsgrad": False, "maximize": False, "dampening": 0, "differentiable": False}


def prepared(optimizer: Algorithm, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a state dict with all settings and counts that our optimizers have.

    Settings that are missing are taken from the optimizer as it is now. States that have not begun (of SGD without
    momentum) are left out. Entries of no parameter, and unknown keys in a state, stay as they are, as in torch.

    Args:
        optimizer: into which the state dict is to be loaded; not changed.
        state_dict: of one of our optimizers, of any age, or of torch's AdamW or SGD; not changed.

    Raises:
        ValueError: the state dict or one of its entries has the wrong type, lacks something, or has a setting that is
            not allowed. The message names the setting, or the parameter and what its state lacks.
    """
    for key in ("state", "param_groups"):
        if not isinstance(state_dict, Mapping) or key not in state_dict:
            raise ValueError(f"the state dict has no {key!r}: it must be what state_dict() of an optimizer gave")
    saved, present = state_dict["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in present]:
        return dict(state_dict)  # torch has the words for it, and loads nothing
    groups = []
    for index, pair in enumerate(zip(present, saved, strict=True)):
        groups.append(_group(optimizer, index, *pair))
    states = dict(state_dict["state"])
    for index, (group, packed) in enumerate(zip(present, groups, strict=True)):
        for number, (weight, key) in enumerate(zip(group["params"], packed["params"], strict=True)):
            if key in states:
                name = parameter_name(group, index, number)
                states[key] = _state(optimizer, weight, states[key], name)
                if not states[key]:
                    del states[key]
    return {**state_dict, "state": states, "param_groups": groups}


def _group(optimizer: Algorithm, index: int, present: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    for name, none in _WITHOUT.items():
        if saved.get(name, none) != none:
            raise ValueError(
                f"{name} is {saved[name]!r} in group {index} of the state dict: {type(optimizer).__name__} has no such "
                f"setting, it must be {none!r}"
            )
    saved = dict(saved)
    rename_settings(saved, optimizer.renamed_settings, f"group {index} of the state dict")
    ours = "step_count" in saved
    missing = {key: present[key] for key in optimizer.defaults if key in present and key not in saved}
    if ours and "rank_scaling" in missing:
        missing["rank_scaling"] = False  # a checkpoint from before there was any
    filled = {**missing, **saved}
    optimizer.check_group(filled)
    coupled = not saved.get("decoupled_weight_decay", "dampening" not in saved)
    if coupled and not ours and filled["weight_decay"]:
        warnings.warn(
            f"group {index} of the state dict has a weight decay of {filled['weight_decay']} within the gradient; that "
            f"of {type(optimizer).__name__} multiplies the weights by 1 - lr * weight_decay: choose it anew",
            OasisWarning,
            stacklevel=9,  # behind torch's load_state_dict, and decorators of both
        )
    return filled


def _state(optimizer: Algorithm, weight: torch.Tensor, saved: Any, name: str) -> dict[str, Any]:
    if not isinstance(saved, Mapping):
        raise ValueError(f"parameter {name} has a saved state of type {type(saved).__name__}: it must be a dict")
    kinds = optimizer.states_of("features" in saved and not saved.get("full_rank"))
    if all(saved.get(kind) is None for kind in kinds) and set(saved) <= {"step", *kinds}:
        return {}
    if any(kind not in saved for kind in kinds):
        return dict(saved)  # refused by name where shapes are compared
    step = saved.get("step", None if "exp_avg_sq" in kinds else 0)
    count = as_number(step, tensors=True)
    if count is None or not count >= 0:
        raise ValueError(
            f"parameter {name} has a saved step of {step!r}: it must be a number from 0, or a tensor of one"
        )
    state = {**saved, "step": torch.tensor(count, dtype=torch.float32, device=weight.device)}
    if "features" in saved:
        if "basis" not in saved and "basis_code" not in saved:
            raise ValueError(f"parameter {name} has saved states in a subspace, and no saved basis")
        # Numbers that are missing: the basis has moved, and no other weight shares it.
        state.setdefault("basis_updates", 1)
        state.setdefault("basis_steps", 0)
        state.setdefault("subspace", f"alone {name}")
    return state
