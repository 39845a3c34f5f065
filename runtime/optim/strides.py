"""Give tensors of one shape one layout in memory, for kernels that pair elements by their order in memory.

torch's fused AdamW walks through the memory of a weight, its gradient and its moments side by side. On a CPU it does
not look at strides, so that a step is silently wrong where they differ; on a GPU it refuses to run. Such differences
are common: a convolution with channels last and a contiguous gradient, an expanded gradient (of ``weight.sum()``), a
transposed parameter, moments from a checkpoint that was written contiguously.
"""

from __future__ import annotations

import torch


def alike(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have one shape and the same strides, so that memory order pairs equal indices.

    Strides of dimensions of size 1 do not count.
    """
    return tensor.shape == other.shape and all(
        one == another or size == 1
        for size, one, another in zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    )


def is_packed(tensor: torch.Tensor) -> bool:
    """Return whether the elements of a tensor fill one stretch of memory, without gaps and without overlaps.

    The order of the dimensions in memory does not matter: a transposed matrix is packed, an expanded one is not.
    """
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def all_plain(*columns: list[torch.Tensor]) -> bool:
    """Whether, place by place, all have one real dtype and are contiguous: the usual case, quickly told."""
    if not all(all(map(torch.Tensor.is_contiguous, column)) for column in columns):
        return False
    dtypes = [[tensor.dtype for tensor in column] for column in columns]
    return all(column == dtypes[0] for column in dtypes[1:]) and not any(d.is_complex for d in set(dtypes[0]))


def laid_out_as(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` with the strides and the dtype of ``other``: itself where it has them, else a copy.

    Args:
        tensor: of the shape of ``other``.
        other: a packed tensor (`is_packed`).
    """
    if tensor.dtype == other.dtype and alike(tensor, other):
        return tensor
    return torch.empty_strided(other.shape, other.stride(), dtype=other.dtype, device=other.device).copy_(tensor)


def state_layout(state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a state with the strides that `torch.zeros_like` would give it: itself where it has them, else a copy.

    Args:
        state: of the shape of the weight.
        weight: the parameter whose state it is.
    """
    if (state.is_contiguous() and weight.is_contiguous()) or (alike(state, weight) and is_packed(weight)):
        return state
    strides = torch.empty_like(weight, device="meta").stride()
    if state.stride() == strides:
        return state
    return torch.empty_strided(state.shape, strides, dtype=state.dtype, device=state.device).copy_(state)
