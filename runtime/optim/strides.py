"""Tensors of one shape laid out alike in memory, for kernels that pair their elements by memory order.

torch's fused AdamW walks through the memory of a weight, its gradient and its moments side by side: on a CPU without
looking at strides, so that a step is wrong without a word where they differ; on a GPU it refuses. Such differences are
usual: a convolution with channels last and a contiguous gradient, an expanded gradient (of ``weight.sum()``), a
transposed parameter, moments from a checkpoint that was written contiguously.
"""

from __future__ import annotations

import torch


def alike(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether elements at equal places of both have equal indices; strides of dimensions of size 1 say nothing."""
    return tensor.shape == other.shape and all(
        one == another or size == 1
        for size, one, another in zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    )


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a stretch of memory, each a place of its own, in whatever order of dimensions."""
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
    return all(
        tensor.is_contiguous() and tensor.dtype == row[0].dtype and not tensor.is_complex()
        for row in zip(*columns, strict=True)
        for tensor in row
    )


def laid_out_as(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the strides of ``other``, which is packed, and its dtype; a copy where it has others."""
    if tensor.dtype == other.dtype and alike(tensor, other):
        return tensor
    return torch.empty_strided(other.shape, other.stride(), dtype=other.dtype, device=other.device).copy_(tensor)


def state_layout(state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A state of a weight's shape, with the strides that `torch.zeros_like` gives to new ones."""
    if (state.is_contiguous() and weight.is_contiguous()) or (alike(state, weight) and is_packed(weight)):
        return state
    strides = torch.empty_like(weight, device="meta").stride()
    if state.stride() == strides:
        return state
    return torch.empty_strided(state.shape, strides, dtype=state.dtype, device=state.device).copy_(state)
