"""Private names of torch that need no compiler: importing them takes no time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


def version_of(tensor: torch.Tensor) -> int:
    """A number that changes with each write in place."""
    return tensor._version


def saved_unversioned(node: torch.autograd.graph.Node) -> list[Any]:
    """What a compiled graph saves for its backward pass beside ``saved_tensors``, without looking for writes to it."""
    return list(getattr(node, "_tensors_no_vc_check", None) or ())


def leave_to_us(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Tell `DistributedDataParallel`, which will wrap ``model``, to leave these parameters alone as well."""
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))
