"""How `add_products` cuts a matrix up on a GPU: a table by rank, dtype and capability; nothing is tried at run time.

Chosen by what ptxas makes of the kernel (`tests/runtime/optim/test_kernel_instructions.py` counts it): instructions an
entry, registers, spills, and shared memory, of which a block of a consumer's card has 99 KiB.

Precision of the product, alpha U Q^T in float32 accumulators:

- float32 weights: "tf32x3", three products of tensor cores whose error is about 1e-6 of the product, in a quarter of
  the instructions of "ieee", which spills.
- bfloat16 and float16 weights: "tf32", which cuts U and Q to 11 bits: at most 2^-10 of each, in a product that was made
  of a gradient of 8 bits or 11. "tf32x3" would take 20 instructions an entry at r = 32 and 33 at r = 128 on an H100;
  this takes 16 and 18, no more than bfloat16 does. Where tensor cores are slow at tf32, which is everywhere but on an
  H100 and a B200, U and Q are rounded to bfloat16 above r = 32, and everywhere above r = 128, where they would not fit
  into shared memory: at most 2^-9 of each, up or down, so that no direction is preferred. Not float16: its range is
  too small for momenta of SGD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """How one block of threads works.

    Attributes:
        rows, columns: of the matrix at a time.
        chunks: of so many columns, one after the other; the first factor's rows are read once for all of them.
        part: columns of the factors at a time, a power of two from 16.
        loop: whether the rank has several parts.
        warps: of 32 threads.
        stages: of loads in flight, over the loop of parts where there is one, else over that of chunks.
        precision: of Triton's products, "tf32" or "tf32x3".
        half: whether factors are rounded to bfloat16.
        registers: what a thread may have at most, so that a second block of threads works while one waits; None for
            any, where so few would not do.
    """

    rows: int
    columns: int
    chunks: int
    part: int
    loop: bool
    warps: int
    stages: int
    precision: str
    half: bool
    registers: int | None = None


def tile_for(rank: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """Return how matrices of a dtype are stepped by products of a rank.

    Args:
        rank: from 1.
        dtype: of the weights: float32, bfloat16 or float16.
        capability: of the GPU, such as (9, 0) of an H100.
    """
    if dtype == torch.float32:
        return Tile(128, 32, 16, min(part_of(rank), 32), rank > 32, 8, 1, "tf32x3", False)  # wider ones spill
    fast = capability[0] in (9, 10)  # H100 and B200: tf32 by a whole warp group
    half = rank > (128 if fast else 32)
    if rank > 128:
        return Tile(128, 64, 8, 64, True, 8, 2, "tf32", half)
    # Two stages of loads of tf32 at r = 128 would take 160 KiB of an H100's shared memory, and gain nothing.
    stages = 1 if fast and rank > 64 else 2
    return Tile(128, 64, 8, part_of(rank), False, 8, stages, "tf32", half, 128 if rank <= 64 else None)


def part_of(rank: int) -> int:
    """Return the power of two, from 16, that a rank fits into."""
    return int(max(16, 1 << (rank - 1).bit_length()))
