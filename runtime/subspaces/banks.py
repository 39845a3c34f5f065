"""Many tensors of one shape side by side in memory, so that one operator reads, writes or clears all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch


def as_bank(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return contiguous tensors of one shape as one [k, ...]: a view where they lie side by side, in order."""
    first = tensors[0]
    place, size = first.data_ptr(), first.numel() * first.element_size()
    # Within one storage: what comes after its end may be another, and is none that a view can reach.
    last = first.untyped_storage().data_ptr() + first.untyped_storage().nbytes()
    if place + len(tensors) * size > last:
        return torch.stack(list(tensors))
    for tensor in tensors:
        if tensor.data_ptr() != place:
            return torch.stack(list(tensors))
        place += size
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def write_bank(tensors: Sequence[torch.Tensor], values: torch.Tensor) -> None:
    """Copy values [k, ...] into k tensors of one shape: in one piece where `as_bank` views them."""
    bank = as_bank(tensors)
    if bank.data_ptr() == tensors[0].data_ptr():
        bank.copy_(values)
    else:
        torch._foreach_copy_(list(tensors), values.unbind())


def side_by_side(owners: Sequence[Any], name: str) -> torch.Tensor:
    """Return the tensors that objects have under a name as one [k, ...] that shares their memory.

    Tensors that do not lie side by side yet are moved, so that the objects get other ones.
    """
    tensors = [getattr(owner, name) for owner in owners]
    bank = as_bank(tensors)
    if bank.data_ptr() != tensors[0].data_ptr():
        for owner, tensor in zip(owners, bank.unbind(), strict=True):
            setattr(owner, name, tensor)
    return bank


class Layout:
    """The places of tensors in one flat buffer, where those of one shape lie side by side.

    A formula that works entry by entry runs once on the buffer, whatever the number of tensors. Tensors of equal shapes
    in equal order have equal layouts.

    Args:
        like: tensors with the shapes, in order; at least one.
    """

    def __init__(self, like: Sequence[torch.Tensor]) -> None:
        self._places: dict[torch.Size, list[int]] = {}
        for place, tensor in enumerate(like):
            self._places.setdefault(tensor.shape, []).append(place)
        self._sizes = [len(places) * shape.numel() for shape, places in self._places.items()]

    def parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return views of a buffer, in the order and with the shapes of the tensors."""
        found: dict[int, torch.Tensor] = {}
        for (shape, places), part in zip(self._places.items(), torch.split(flat, self._sizes), strict=True):
            found.update(zip(places, part.view(len(places), *shape).unbind(), strict=True))
        return [found[place] for place in range(len(found))]

    def join(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a buffer with the numbers of tensors of one device, whatever their strides; of one, perhaps a view.

        Args:
            dtype: of the buffer; None for that of the tensors, which is one.
        """
        dtype = dtype or tensors[0].dtype
        if len(tensors) == 1:
            return tensors[0].reshape(-1).to(dtype)
        flat = torch.empty(sum(self._sizes), dtype=dtype, device=tensors[0].device)
        torch._foreach_copy_(self.parts(flat), list(tensors))
        return flat


def new_in_banks(
    like: Sequence[torch.Tensor], kinds: Sequence[Hashable], make: Callable[..., torch.Tensor]
) -> list[torch.Tensor]:
    """Return new tensors of the shapes and dtypes of tensors of one device, in one allocation for each dtype.

    Those of one kind lie side by side, in order, so that `as_bank` views them.

    Args:
        kinds: of each; tensors of one kind have one shape and one dtype.
        make: `torch.zeros` or `torch.empty`.
    """
    by_dtype: dict[torch.dtype, dict[Any, list[int]]] = {}
    for place, (tensor, kind) in enumerate(zip(like, kinds, strict=True)):
        by_dtype.setdefault(tensor.dtype, {}).setdefault(kind, []).append(place)
    found: dict[int, torch.Tensor] = {}
    for dtype, by_kind in by_dtype.items():
        sizes = [len(places) * like[places[0]].numel() for places in by_kind.values()]
        buffer = make(sum(sizes), dtype=dtype, device=like[0].device)
        for places, part in zip(by_kind.values(), torch.split(buffer, sizes), strict=True):
            found.update(zip(places, part.view(len(places), *like[places[0]].shape).unbind(), strict=True))
    return [found[place] for place in range(len(like))]


def in_dtypes_of(tensors: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of one device, contiguous and in the dtypes of others of their shapes.

    All that have another dtype, or lie in pieces, are one copy.
    """
    places = [
        place for place, tensor in enumerate(tensors) if tensor.dtype != like[place].dtype or not tensor.is_contiguous()
    ]
    cast = list(tensors)
    if not places:
        return cast
    wanted = [like[place] for place in places]
    copies = new_in_banks(wanted, [(tensor.dtype, tensor.shape) for tensor in wanted], torch.empty)
    torch._foreach_copy_(copies, [tensors[place] for place in places])
    for place, copy in zip(places, copies, strict=True):
        cast[place] = copy
    return cast
