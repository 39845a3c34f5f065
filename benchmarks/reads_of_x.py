"""Whether P = X Q, C = X^T P and ||X||^2 gain from reading X once: milliseconds, the least of 40 runs.

python -m benchmarks.reads_of_x
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate

RANK, ROWS_OF_A_BLOCK = 32, 256


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    rows = []
    for tokens, n in ((2048, 1024), (4096, 1024), (2048, 2816), (4096, 2816)):
        x, q = torch.randn(tokens, n), torch.randn(n, RANK)
        two = least(lambda x=x, q=q: two_passes(x, q))
        one = least(lambda x=x, q=q: one_pass(x, q))
        rows.append([f"{tokens} x {n}", f"{two:.2f}", f"{one:.2f}"])
    print(tabulate(rows, ["X", "P, then C", "by blocks of 256 rows"], tablefmt="github"), end="\n\n")
    x, w = torch.randn(4096, 1024), torch.randn(1024)
    rows = []
    for name, function in (("no sum", normalized), ("over all of X", summed), ("row by row", summed_by_rows)):
        compiled = torch.compile(function)
        rows.append([name, f"{least(lambda compiled=compiled: compiled(x, w)):.2f}"])
    print(tabulate(rows, ["RMSNorm of 4096 x 1024, and ||X||^2", "ms"], tablefmt="github"))


def two_passes(x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = x @ q
    return p, x.T @ p


def one_pass(x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p, c = x.new_empty(x.shape[0], q.shape[1]), torch.zeros_like(q)
    for start in range(0, x.shape[0], ROWS_OF_A_BLOCK):
        rows = x[start : start + ROWS_OF_A_BLOCK]
        c.addmm_(rows.T, torch.mm(rows, q, out=p[start : start + ROWS_OF_A_BLOCK]))
    return p, c


def normalized(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w


def summed(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = normalized(x, w)
    return y, y.square().sum()


def summed_by_rows(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = normalized(x, w)
    return y, y.square().sum(-1).sum()


def least(function: Callable[[], Any], times: int = 40) -> float:
    function()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1e3


if __name__ == "__main__":
    main()
