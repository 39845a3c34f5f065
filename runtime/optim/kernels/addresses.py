"""Tables of addresses on a device, by which one launch of a kernel steps many tensors.

A table is made once for the tensors that it names. As a training loop comes to rest, so do its addresses: weights and
states stay where they are, and the allocator gives gradients of the next step the places of the last. So nothing is
copied, and where something is, from pinned memory, the host does not wait for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

LIMIT = 512  # tables; where gradients have new places at every step, old tables make room
_TABLES: OrderedDict[Any, torch.Tensor] = OrderedDict()


def address_table(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the addresses of tensors of one device, int64 [k], on the device.

    A kernel that reads them must be launched, on the current stream, while the tensors live; they may go after that.
    """
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    return device_table(("addresses", *addresses), lambda: torch.tensor(addresses), tensors[0].device)


def device_table(key: tuple[object, ...], make: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return what ``make`` makes, on a device; made once for each key.

    Args:
        key: the name of the kind of table, and all that such a table is a function of.
    """
    # Work on another stream would not wait for the copy.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    full_key = (device, stream, key)
    found = _TABLES.get(full_key)
    if found is None:
        made = make()
        found = made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made
        _TABLES[full_key] = found
        if len(_TABLES) > LIMIT:
            _TABLES.popitem(last=False)
    _TABLES.move_to_end(full_key)
    return found
