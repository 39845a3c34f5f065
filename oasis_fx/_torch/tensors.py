"""Private names of tensors and of nodes of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# make_wrapper(cls, shape, strides, storage_offset, memory_format, dtype, layout, device) makes a tensor of a subclass
# without memory. It takes a fifth longer where the arguments are named.
make_wrapper: Callable[..., Any] = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]


def version_of(tensor: torch.Tensor) -> int:
    """A number that changes with each write in place."""
    return tensor._version


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors (fake ones, too) lie in one storage."""
    try:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse tensor, or one within a transform such as vmap, has none
        return False


def saved_unversioned(node: torch.autograd.graph.Node) -> list[Any]:
    """What a compiled graph saves for its backward pass beside ``saved_tensors``, without looking for writes to it."""
    return list(getattr(node, "_tensors_no_vc_check", None) or ())
