"""Make dictionaries with weak references to tensors that do not keep torch from swapping a tensor's contents.

`torch.utils.swap_tensors` refuses a tensor that has weak references, and cannot be asked to move them. Modules call it
in `model.to(...)` and `load_state_dict` under `torch.__future__.set_swap_module_params_on_conversion(True)`, and for
DTensors and quantised weights always. A swap exchanges all that a tensor object has but its address, so that no other
key would do: a token in its `__dict__` goes to the other tensor, and an address is used again once a tensor is gone. So
the references are removed for the time of a swap. An entry stays with the tensor object, as an optimizer's state does.
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_dictionaries: WeakSet[ByTensor] = WeakSet()


class ByTensor(WeakTensorKeyDictionary):
    """A dictionary whose keys are tensor objects, held weakly: the entry of a deleted tensor goes with it."""

    def __init__(self) -> None:
        super().__init__()
        _dictionaries.add(self)

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # by identity, to be in a set


_swap_tensors = torch.utils.swap_tensors


@functools.wraps(_swap_tensors)
def _swap_known_tensors(t1: torch.Tensor, t2: torch.Tensor) -> None:
    entries: list[tuple[ByTensor, torch.Tensor, Any]] = []
    for known in list(_dictionaries):
        entries += [(known, tensor, known.pop(tensor)) for tensor in (t1, t2) if tensor in known]
    try:
        _swap_tensors(t1, t2)
    finally:
        for known, tensor, entry in entries:
            known[tensor] = entry


torch.utils.swap_tensors = _swap_known_tensors
