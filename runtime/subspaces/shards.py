"""Handle parameters that are shards of a weight: DTensors, as FSDP2's `fully_shard` makes them.

An optimizer steps the local part, which has some rows of the weight, by the same rows of the gradient; its states have
those rows too, and are DTensors in a state dict alone, where `torch.distributed.checkpoint` looks for them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch


def is_sharded(tensor: Any) -> bool:
    """Return whether a value is a DTensor, without importing torch's module of DTensors."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False  # asked several times a step for each parameter
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a DTensor that is on this rank, itself and not a copy; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def local_gradient(weight: torch.Tensor) -> torch.Tensor | None:
    """Return the gradient of the local part of a weight, placed as the weight is, or None where it has none."""
    gradient = weight.grad
    if gradient is None or not is_sharded(gradient):
        return gradient
    if gradient.placements != weight.placements:  # type: ignore[attr-defined]
        with torch.no_grad():
            gradient = gradient.redistribute(placements=weight.placements)  # type: ignore[attr-defined]
    return local(gradient)


def agreed(verdict: torch.Tensor, weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return a bool scalar: whether ``verdict`` is true on all ranks that have a part of one of the weights.

    Args:
        verdict: bool scalar of this rank.
        weights: of which sharded ones count; without any, the verdict is returned as it is.
    """
    meshes = {weight.device_mesh: None for weight in weights if is_sharded(weight)}  # type: ignore[attr-defined]
    if not meshes:
        return verdict
    found = verdict.float()
    for mesh in meshes:
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group=mesh.get_group(dim))
    return found > 0


def to_checkpoint(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a state of the local rows of a sharded weight as a DTensor of the rows of all ranks."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((weight.shape[0], *value.shape[1:]))
    strides = torch.empty(shape, device="meta").stride()
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=strides)  # type: ignore[no-any-return]


def full(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a state with the rows of all ranks, on each of them."""
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined, no-any-return]


def from_checkpoint(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows of a state that is a DTensor or, from a run of one process, has the rows of all ranks."""
    if is_sharded(value):
        return local(value)
    from torch.distributed.tensor import DTensor, distribute_tensor

    if value.shape[:1] != weight.shape[:1] or not isinstance(weight, DTensor):
        return value
    mesh, placements = weight.device_mesh, weight.placements
    return local(distribute_tensor(value.to(weight.device), mesh, placements, src_data_rank=None))
