"""Optimizer states by names of weights, as torchtitan's checkpoints have them: what they are loaded into, and back.

Keys are ``state.{weight}.{entry}`` and ``param_groups.{weight}.{setting}``, where torch has numbers of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from oasis_fx.runtime.optim.base import SubspaceOptimizer
from oasis_fx.runtime.subspaces.shards import is_sharded, local, to_checkpoint


def template_of(optimizer: SubspaceOptimizer, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint can be loaded into: tensors of its shapes and dtypes, sharded as the weights are now.

    Args:
        optimizer: one whose groups have ``param_names``.
        entries: metadata of `torch.distributed.checkpoint`, by the keys of a flat state dict. Those of weights that the
            optimizer does not have are left out.

    Returns:
        An entry for each of the optimizer's own. What is no tensor is None.
    """
    found: dict[str, Any] = {}
    for name, weight in _named(optimizer):
        prefix = f"state.{name}."
        own = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
        full_rank = "features" not in own or "full_rank" in own
        of_rows = optimizer.states_of(not full_rank) if is_sharded(weight) else ()
        for kind, saved in own.items():
            found[prefix + kind] = _empty(saved, weight, kind in of_rows)
        found |= {key: None for key in entries if key.startswith(f"param_groups.{name}.")}
    return found


def _empty(saved: Any, weight: torch.Tensor, has_rows: bool) -> torch.Tensor | None:
    if not isinstance(saved, TensorStorageMetadata):
        return None
    shape = list(saved.size)
    part = local(weight)
    if has_rows:
        shape[0] = part.shape[0]
    values = torch.empty(shape, dtype=saved.properties.dtype, device=part.device)
    return to_checkpoint(values, weight) if has_rows else values


def nested_states(optimizer: SubspaceOptimizer, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict as torch's optimizers have them, of those entries of a flat one that are the optimizer's.

    Raises:
        ValueError: the settings of a group are missing, so that the checkpoint is none of this optimizer's weights.
    """
    state: dict[int, dict[str, Any]] = {}
    for number, (name, _) in enumerate(_named(optimizer)):
        own = _below(flat, f"state.{name}.")
        if own:
            state[number] = own
    groups, first = [], 0
    for group in optimizer.param_groups:
        names = group["param_names"]
        settings = _below(flat, f"param_groups.{names[0]}.") if names else {}
        if names and not settings:
            raise ValueError(
                f"the checkpoint has no settings of an optimizer for {names[0]}: it is one of another model"
            )
        groups.append({**settings, "params": list(range(first, first + len(names))), "param_names": list(names)})
        first += len(names)
    return {"state": state, "param_groups": groups}


def _below(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}


def _named(optimizer: SubspaceOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)
