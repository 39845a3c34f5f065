"""Tiles of the kernel that steps low-rank weights: the bandwidth of each of a list, at three ranks.

    python -m benchmarks.gpu.tiles --out FOLDER [--device cpu --tiny]

What it finds stands in `oasis_fx.runtime.optim.kernels.tiles`. Four bfloat16 weights of 14336 x 4096, stochastic
rounding, a gate; each entry counts as read once and written once. They are compiled in several processes at once.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu.arguments import parser
from benchmarks.gpu.record import Record

COUNT, M, N = 4, 14336, 4096
# rows, columns, chunks, warps, stages, registers of a thread at most
SHAPES = (
    (64, 64, 8, 4, 1, None), (64, 64, 8, 4, 2, None), (64, 64, 8, 4, 3, None), (64, 64, 8, 4, 2, 128),
    (64, 64, 4, 4, 2, None), (64, 64, 16, 4, 2, None), (64, 128, 8, 8, 2, None), (128, 64, 8, 4, 2, None),
    (128, 64, 8, 8, 2, None), (128, 64, 8, 8, 2, 128),
)  # fmt: skip
TIMES = 12


def main() -> None:
    args = parser(__doc__).parse_args()
    record = Record(args.out, "tiles", args.device)
    record.add({"runs": args.device == "cuda"})
    if args.device != "cuda":
        return
    cases = list(_cases())
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        faults = pool.map(_compiled, cases, chunksize=1)
    for (rank, tile), fault in zip(cases, faults, strict=True):
        found = {"fault": fault} if fault else {"gb_per_s": _bandwidth(rank, tile)}
        record.add({"rank": rank, **asdict(tile), **found})
        print(rank, tile, found, flush=True)


def _cases() -> Iterator[tuple[int, Any]]:
    from oasis_fx.runtime.optim.kernels.tiles import Tile, part_of

    for rank in (32, 128, 256):
        part, loop = (part_of(rank), False) if rank <= 128 else (64, True)
        for rows, columns, chunks, warps, stages, registers in SHAPES:
            yield rank, Tile(rows, columns, chunks, part, loop, warps, stages, "tf32", True, registers)


def _compiled(case: tuple[int, Any]) -> str | None:
    """Leave the kernel in Triton's cache; return what went wrong."""
    try:
        _run(case[1], *_tensors(case[0]))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def _tensors(rank: int) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor], torch.Tensor]:
    weights = [torch.randn(M, N, device="cuda", dtype=torch.bfloat16) for _ in range(COUNT)]
    bases = [torch.randn(N, rank, device="cuda") for _ in range(COUNT)]
    return weights, torch.randn(COUNT, M, rank, device="cuda"), bases, torch.ones((), dtype=torch.bool, device="cuda")


def _run(tile: Any, weights: Any, bank: torch.Tensor, bases: Any, gate: torch.Tensor) -> None:
    from oasis_fx.runtime.optim.kernels import add_products

    add_products.tile_for = lambda *_: tile
    add_products.add_products_(weights, bank, bases, lr=1e-4, weight_decay=0.1, factor=1.0, gate=gate, seed=5)


def _bandwidth(rank: int, tile: Any) -> float:
    tensors = _tensors(rank)
    _run(tile, *tensors)
    marks = []
    for _ in range(TIMES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        _run(tile, *tensors)
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    milliseconds = statistics.median(begin.elapsed_time(end) for begin, end in marks)
    return 4 * COUNT * M * N / milliseconds / 1e6


if __name__ == "__main__":
    main()
