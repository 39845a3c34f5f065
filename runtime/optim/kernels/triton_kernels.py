"""The steps of weights as one Triton kernel each, for GPUs.

`weight_step` and `adamw` compute the same by a dozen kernels of torch a weight, each of which reads or writes the whole
of it in float32; here a weight is read and written once, in its own dtype, and nothing of its size is made besides.
Imported where there are CUDA tensors, and in tests, which run the kernels in Triton's interpreter.

Rounding is stochastic, as in `oasis_fx.runtime.optim.rounding`, by Philox numbers: a function of the seed and of
an entry's place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Seeds above 2^32 all have one type; a seed of 1, or one that 16 divides, must not be compiled for.
_SEED_BASE = 1 << 40
_BLOCK_ROWS, _BLOCK_COLUMNS, _BLOCK_RANK = 64, 64, 32
_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def round_stochastically(value, random):
    """float32 to the float32 that bfloat16 holds next, up or down with the odds of the distance; NaN stays."""
    bits = value.to(tl.int32, bitcast=True) + (random & 0xFFFF).to(tl.int32)
    rounded = (bits & -65536).to(tl.float32, bitcast=True)
    return tl.where(value != value, value, rounded)


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def add_product_kernel(
    weight, u, basis, gate, keep, alpha, seed, m, n, stride_m, stride_n, rank,
    GATED: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """``W = keep W + alpha U Q^T`` for a block of W."""
    open_gate = True
    if GATED:
        open_gate = tl.load(gate) != 0
    if open_gate:
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            ks = part * PART + tl.arange(0, PART)
            of_u = (rows < m)[:, None] & (ks < rank)[None, :]
            of_q = (ks < rank)[:, None] & (columns < n)[None, :]
            us = tl.load(u + rows[:, None] * rank + ks[None, :], mask=of_u, other=0.0)
            qs = tl.load(basis + columns[None, :] * rank + ks[:, None], mask=of_q, other=0.0)
            product += tl.dot(us, qs, input_precision="ieee")
        places = weight + rows[:, None] * stride_m + columns[None, :] * stride_n
        mask = (rows < m)[:, None] & (columns < n)[None, :]
        new = tl.load(places, mask=mask, other=0.0).to(tl.float32) * keep + alpha * product
        if ROUND:
            new = round_stochastically(new, tl.randint(seed, (rows[:, None] * n + columns[None, :]).to(tl.int32)))
        tl.store(places, new.to(weight.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def adamw_kernel(
    weight, gradient, mean, second, gate, biases, lr, beta1, beta2, eps, keep, seed, count,
    GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW on a block of a bfloat16 weight with bfloat16 moments, computed in float32, all rounded stochastically."""
    open_gate = True
    if GATED:
        open_gate = tl.load(gate) != 0
    if open_gate:
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = places < count
        g = tl.load(gradient + places, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(mean + places, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(second + places, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + places, mask=mask, other=0.0).to(tl.float32)
        m = m + (1 - beta1) * (g - m)
        v = v * beta2 + (1 - beta2) * g * g
        w = w * keep - lr * (m / tl.load(biases)) / (tl.sqrt(v / tl.load(biases + 1)) + eps)
        first, other, third, _ = tl.randint4x(seed, places.to(tl.int32))
        tl.store(weight + places, round_stochastically(w, first).to(tl.bfloat16), mask=mask)
        tl.store(mean + places, round_stochastically(m, other).to(tl.bfloat16), mask=mask)
        tl.store(second + places, round_stochastically(v, third).to(tl.bfloat16), mask=mask)


def add_product_(
    weight: torch.Tensor,
    u: torch.Tensor,
    basis: torch.Tensor,
    *,
    keep: float,
    alpha: float,
    gate: torch.Tensor | None,
    seed: int | None,
) -> None:
    """``weight = keep weight + alpha U Q^T`` in place; nothing where ``gate`` is false.

    Args:
        weight: [m, n] of any strides; float32, bfloat16 or float16.
        u: [m, r], float32, contiguous. basis: [n, r], likewise.
        gate: bool scalar, or None for true.
        seed: of stochastic rounding, which is bfloat16's; None: to nearest.
    """
    (m, n), rank = weight.shape, u.shape[1]
    grid = (triton.cdiv(m, _BLOCK_ROWS), triton.cdiv(n, _BLOCK_COLUMNS))
    add_product_kernel[grid](
        weight, u, basis, gate if gate is not None else weight, keep, alpha, _SEED_BASE + (seed or 0), m, n,
        weight.stride(0), weight.stride(1), rank, GATED=gate is not None, ROUND=seed is not None,
        ROWS=_BLOCK_ROWS, COLUMNS=_BLOCK_COLUMNS, PARTS=triton.cdiv(rank, _BLOCK_RANK), PART=_BLOCK_RANK,
    )  # fmt: skip


def step_adamw_(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    second: torch.Tensor,
    biases: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    gate: torch.Tensor | None,
    seed: int,
) -> None:
    """AdamW in place on bfloat16 tensors of one shape, dense in memory and of one layout.

    Args:
        biases: ``1 - beta^t`` of both moments [2], float32.
        gate, seed: as of `add_product_`.
    """
    count = weight.numel()
    adamw_kernel[(triton.cdiv(count, _BLOCK),)](
        weight, gradient, mean, second, gate if gate is not None else weight, biases, lr, beta1, beta2, eps,
        1 - lr * weight_decay, _SEED_BASE + seed, count, GATED=gate is not None, BLOCK=_BLOCK,
    )  # fmt: skip
