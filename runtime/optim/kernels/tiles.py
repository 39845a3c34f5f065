"""Choose how `add_products` cuts a matrix up on a GPU, by rank, dtype and capability; nothing is tried at run time.

The tiles were chosen by what ptxas makes of the kernel (`tests/runtime/optim/test_kernel_instructions.py` counts it):
instructions per entry, registers, spills, and shared memory, of which a block on a consumer's card has 99 KiB.

On an H200 the tiles for H100 and B200 were the fastest of ten or more that were tried for each of three ranks
(`benchmarks/gpu/tiles.py`): 3.0, 2.3 and 1.5 TB/s at r = 32, 128 and 256, where a copy has 4.2.

Precision of the product, alpha U Q^T in float32 accumulators:

- float32 weights: "tf32x3", three products of tensor cores whose error is about 1e-6 of the product, in a quarter of
  the instructions of "ieee", which spills.
- bfloat16 and float16 weights: U and Q are rounded to bfloat16, at most 2^-8 of each entry, up or down, so that no
  direction is preferred. Of the change of a weight that is 0.24 % in norm, where the gradient that U was made of has 8
  bits or 11 itself. With "tf32", which rounds to 2^-11, blocks read twice the bytes: 1.1 TB/s at r = 128 on an H200 in
  place of 2.3. Not float16: its range is too small for momenta of SGD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """How one block of threads of `add_products` works.

    Attributes:
        rows, columns: of the part of the matrix that it steps at a time.
        chunks: how many such parts it steps, side by side; the first factor's rows are read once for all of them.
        part: columns of the factors at a time, a power of two from 16.
        loop: whether the rank has several parts.
        warps: of 32 threads.
        stages: of loads in flight, over the loop of parts where there is one, else over that of chunks.
        precision: of Triton's products of float32 factors.
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
    """Return the tile by which matrices of a dtype are stepped, for products of factors of a rank.

    Args:
        rank: from 1.
        dtype: of the weights: float32, bfloat16 or float16.
        capability: of the GPU, such as (9, 0) of an H100.
    """
    if dtype == torch.float32:
        return Tile(128, 32, 16, min(part_of(rank), 32), rank > 32, 8, 1, "tf32x3", False)  # wider ones spill
    # A third stage pays where shared memory leaves room for several blocks of threads all the same.
    stages = 3 if capability[0] in (9, 10) else 2
    if rank <= 128:
        return Tile(64, 64, 8, part_of(rank), False, 4, stages, "tf32", True)
    return Tile(64, 64, 8, 64, True, 4, stages, "tf32", True)


def part_of(rank: int) -> int:
    """Return the smallest power of two, from 16, that is no less than a rank."""
    return int(max(16, 1 << (rank - 1).bit_length()))
