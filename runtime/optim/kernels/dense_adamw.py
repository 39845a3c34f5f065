"""Step all bfloat16 weights of a device by AdamW in one launch of a Triton kernel, with stochastic rounding.

Tensors are cut into blocks of `BLOCK` entries, numbered through all tensors; a table says whose each block is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from oasis_fx.runtime.optim.kernels.addresses import address_table, device_table
from oasis_fx.runtime.optim.kernels.rounding import SEED_BASE, round_stochastically, sixteen_bits

BLOCK = 2048
_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _noise(seed, block, stream, BLOCK: tl.constexpr):
    places = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    return tl.reshape(sixteen_bits(seed, places, stream), (BLOCK,))


@triton.jit(do_not_specialize=["seed", "tensors"])  # type: ignore[untyped-decorator]
def adamw_kernel(
    addresses, layout, tensors, gate, biases, lr, beta1, beta2, eps, decay, seed,
    GATED: tl.constexpr, LR_ON_DEVICE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Step one block of one tensor, computed in float32.

    Args:
        addresses: int64 [4, k]: of weights, gradients, first and second moments.
        layout: int64 [2 k + blocks]: sizes, first blocks, and the tensor of each block.
        biases: ``1 - beta^t`` of both moments of each tensor, float32 [k, 2].
    """
    open_gate = True
    if GATED:
        open_gate = tl.load(gate) != 0
    if open_gate:
        if LR_ON_DEVICE:
            rate = tl.load(lr).to(tl.float32)
        else:
            rate = lr
        block = tl.program_id(0)
        k = tl.load(layout + 2 * tensors + block)
        size, start = tl.load(layout + k), (block - tl.load(layout + tensors + k)) * BLOCK
        kind = tl.pointer_type(tl.bfloat16)
        weight = tl.load(addresses + k).to(kind, bitcast=True)
        gradient = tl.load(addresses + tensors + k).to(kind, bitcast=True)
        mean = tl.load(addresses + 2 * tensors + k).to(kind, bitcast=True)
        second = tl.load(addresses + 3 * tensors + k).to(kind, bitcast=True)
        if ALIGNED:
            size, start = tl.multiple_of(size, 16), tl.multiple_of(start, 16)
            weight, gradient = tl.multiple_of(weight, 16), tl.multiple_of(gradient, 16)
            mean, second = tl.multiple_of(mean, 16), tl.multiple_of(second, 16)
        places = start + tl.arange(0, BLOCK)
        mask = places < size
        g = tl.load(gradient + places, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(mean + places, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(second + places, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + places, mask=mask, other=0.0).to(tl.float32)
        m = m + (1 - beta1) * (g - m)
        v = v * beta2 + (1 - beta2) * g * g
        step = (m / tl.load(biases + 2 * k)) / (tl.sqrt(v / tl.load(biases + 2 * k + 1)) + eps)
        w = w * (1 - rate * decay) - rate * step
        one = (block * 0).to(tl.int32) + 1
        tl.store(weight + places, round_stochastically(w, _noise(seed, block, 0 * one, BLOCK)), mask=mask)
        tl.store(mean + places, round_stochastically(m, _noise(seed, block, one, BLOCK)), mask=mask)
        tl.store(second + places, round_stochastically(v, _noise(seed, block, 2 * one, BLOCK)), mask=mask)


def step_dense_adamw_(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
    seconds: Sequence[torch.Tensor],
    biases: torch.Tensor,
    *,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    gate: torch.Tensor | None,
    seed: int,
) -> None:
    """Step bfloat16 weights of one device by AdamW in place; nothing changes where ``gate`` is false.

    Args:
        weights, gradients, means, seconds: k each, contiguous bfloat16; each four of one size.
        biases: ``1 - beta^t`` of both moments of each weight, float32 [k, 2], contiguous.
        lr: a number, or a tensor with one element on the device, which the host does not read.
        beta1, beta2, eps, weight_decay: AdamW's.
        gate: bool scalar on the device, or None for true.
        seed: from 0, of stochastic rounding.
    """
    tensors = [*weights, *gradients, *means, *seconds]
    sizes = tuple(weight.numel() for weight in weights)
    device = weights[0].device
    layout = device_table(("blocks of AdamW", *sizes), lambda: _layout(sizes), device)
    aligned = all(size % 16 == 0 for size in sizes) and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    adamw_kernel[(layout.numel() - 2 * len(sizes),)](
        address_table(tensors), layout, len(sizes), biases if gate is None else gate, biases, lr, beta1, beta2, eps,
        weight_decay, SEED_BASE + seed,
        GATED=gate is not None, LR_ON_DEVICE=isinstance(lr, torch.Tensor), ALIGNED=aligned, BLOCK=BLOCK,
        num_warps=_WARPS,
    )  # fmt: skip


def _layout(sizes: Sequence[int]) -> torch.Tensor:
    """Return int64 [2 k + blocks]: the sizes, the number of each tensor's first block, and the tensor of each block."""
    lengths = torch.tensor(sizes, dtype=torch.int64)
    blocks = (lengths + BLOCK - 1) // BLOCK
    owners = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
    return torch.cat([lengths, blocks.cumsum(0) - blocks, owners])
