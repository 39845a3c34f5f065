"""Compute ``W = keep W + alpha U Q^T`` for all weights of one shape, in one launch of a Triton kernel.

A weight is read and written once, in its own dtype. Each block of threads takes a tile of it
(`oasis_fx.runtime.optim.kernels.tiles`) and goes through its chunks of columns while the loads of the next one are
under way. Above some rank the factors are read part by part, in a loop that runs on the GPU, so that neither the code
nor the time to compile it grows with the rank.

A transposed weight, of strides (1, m), is one whose rows lie in memory as columns: ``W^T = keep W^T + alpha Q U^T``, so
the factors change places.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from oasis_fx.runtime.optim.kernels.addresses import address_table
from oasis_fx.runtime.optim.kernels.layouts import row_stride
from oasis_fx.runtime.optim.kernels.rounding import SEED_BASE, round_stochastically, sixteen_bits
from oasis_fx.runtime.optim.kernels.tiles import tile_for

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_INTERPRETED = (9, 0)  # whose tiles a CPU takes in Triton's interpreter


@triton.jit  # type: ignore[untyped-decorator]
def _load_part(places, ks, rank, EVEN: tl.constexpr):
    """Load a part of a factor, with zeros beyond the rank."""
    if EVEN:
        part = tl.load(places)
    else:
        part = tl.load(places, mask=ks < rank, other=0.0)
    return part


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def add_products_kernel(
    weights, bank, bases, gate, lr, decay, seed, m, n, stride, rank,
    DTYPE: tl.constexpr, TURNED: tl.constexpr, GATED: tl.constexpr, LR_ON_DEVICE: tl.constexpr, ROUND: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, PART: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Step some chunks of the k-th weight, as it lies in memory: [m, n], its rows ``stride`` apart.

    Args:
        weights, bases: addresses, int64 [k]. bank: alpha U [k, m, r], or [k, n, r] of turned weights.
        lr: float, or the address of one. decay: float; ``keep = 1 - lr decay``.
        HALF: whether bank and bases are bfloat16; else they are float32.
    """
    open_gate = True
    if GATED:
        open_gate = tl.load(gate) != 0
    if open_gate:
        if LR_ON_DEVICE:
            rate = tl.load(lr).to(tl.float32)
        else:
            rate = lr
        keep = 1 - rate * decay
        operand: tl.constexpr = tl.bfloat16 if HALF else tl.float32
        k = tl.program_id(1)
        target = tl.load(weights + k).to(tl.pointer_type(DTYPE), bitcast=True)
        basis = tl.load(bases + k).to(tl.pointer_type(operand), bitcast=True)
        if ALIGNED:
            target, basis = tl.multiple_of(target, 16), tl.multiple_of(basis, 16)
        if TURNED:
            left, right = basis, bank + k.to(tl.int64) * n * rank
        else:
            left, right = bank + k.to(tl.int64) * m * rank, basis
        across = tl.cdiv(n, COLUMNS * CHUNKS)
        row, first = tl.program_id(0) // across * ROWS, tl.program_id(0) % across * (COLUMNS * CHUNKS)
        # Within a block of threads int32 is wide enough, so 64-bit numbers are in scalars only.
        rows, columns, ks = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, PART)
        # Rows beyond the last are that one again: what comes of them is not stored.
        lefts = left + row.to(tl.int64) * rank + tl.minimum(rows, m - 1 - row)[:, None] * rank + ks[None, :]
        if not LOOP:
            a = _load_part(lefts, ks[None, :], rank, EVEN)
        places = target + row.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
        eighths = rows[:, None] * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
        for chunk in tl.range(0, tl.minimum(CHUNKS, tl.cdiv(n - first, COLUMNS)), num_stages=1 if LOOP else STAGES):
            column = first + chunk * COLUMNS
            nearby = tl.minimum(columns, n - 1 - column)
            rights = right + column.to(tl.int64) * rank + nearby[None, :] * rank + ks[:, None]
            mask = (rows < m - row)[:, None] & (columns < n - column)[None, :]
            old = tl.load(places + column, mask=mask)
            if LOOP:
                product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
                for start in tl.range(0, rank, PART, num_stages=STAGES):
                    a = _load_part(lefts + start, ks[None, :], rank - start, EVEN)
                    b = _load_part(rights + start, ks[:, None], rank - start, EVEN)
                    product = tl.dot(a, b, product, input_precision=PRECISION)
            else:
                b = _load_part(rights, ks[:, None], rank, EVEN)
                product = tl.dot(a, b, input_precision=PRECISION)
            new = tl.fma(old.to(tl.float32), keep, product)
            if ROUND:
                place = (tl.program_id(0) * CHUNKS + chunk) * (ROWS * COLUMNS // 8)
                noise = sixteen_bits(seed, place + eighths, k)
                # In whatever order: noise that lay otherwise than what it is added to would go through shared memory.
                noise = tl.reshape(noise, (ROWS, COLUMNS), can_reorder=True)
                tl.store(places + column, round_stochastically(new, noise), mask=mask)
            else:
                tl.store(places + column, new.to(DTYPE), mask=mask)


def add_products_(
    weights: Sequence[torch.Tensor],
    bank: torch.Tensor,
    bases: Sequence[torch.Tensor],
    *,
    lr: float | torch.Tensor,
    weight_decay: float,
    factor: float,
    gate: torch.Tensor | None,
    seed: int | None,
) -> None:
    """Compute ``W_k = (1 - lr weight_decay) W_k + lr factor U_k Q_k^T`` in place; nothing where ``gate`` is false.

    Args:
        weights: [m, n] each, of one device, dtype (float32, bfloat16, float16) and `row_stride`.
        bank: U [k, m, r], float32, contiguous. bases: Q [n, r] each, likewise; they may occur more than once.
        lr: a number, or a tensor with one element on the device, which the host does not read.
        gate: bool scalar on the device, or None for true.
        seed: from 0, of stochastic rounding to bfloat16; None rounds to nearest.
    """
    first, rank = weights[0], bank.shape[2]
    layout = row_stride(first)
    assert layout is not None
    turned, stride = layout
    m, n = first.shape[::-1] if turned else first.shape
    tile = tile_for(rank, first.dtype, _capability(first.device))
    dtype = torch.bfloat16 if tile.half else torch.float32
    # alpha is multiplied in here, so that U is rounded once; blocks of threads read it, and Q, several times.
    bank = torch.mul(bank, lr * factor, out=torch.empty_like(bank, dtype=dtype))
    if tile.half:
        bases = _in_bfloat16(bases)
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (*weights, *bases))
    grid = (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns * tile.chunks), len(weights))
    add_products_kernel[grid](
        address_table(weights), bank, address_table(bases), bank if gate is None else gate,
        lr if isinstance(lr, torch.Tensor) else float(lr), weight_decay, SEED_BASE + (seed or 0), m, n, stride, rank,
        DTYPE=_DTYPES[first.dtype], TURNED=turned, GATED=gate is not None, LR_ON_DEVICE=isinstance(lr, torch.Tensor),
        ROUND=seed is not None, ALIGNED=aligned,
        EVEN=rank % tile.part == 0, PRECISION=tile.precision, HALF=tile.half, ROWS=tile.rows, COLUMNS=tile.columns,
        CHUNKS=tile.chunks, PART=tile.part, LOOP=tile.loop, STAGES=tile.stages, num_warps=tile.warps,
        maxnreg=tile.registers if aligned else None,  # entry by entry, more addresses are in registers
    )  # fmt: skip


def _in_bfloat16(bases: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return bases rounded to bfloat16, those that occur several times once."""
    known = {basis.data_ptr(): basis for basis in bases}
    n, r = bases[0].shape
    rounded = torch.empty(len(known), n, r, dtype=torch.bfloat16, device=bases[0].device).unbind()
    torch._foreach_copy_(list(rounded), list(known.values()))
    by_address = dict(zip(known, rounded, strict=True))
    return [by_address[basis.data_ptr()] for basis in bases]


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _INTERPRETED
