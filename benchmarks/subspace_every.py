"""What an optimizer step costs when bases move at each k-th step only.

    python -m benchmarks.subspace_every --every 1,10 --out benchmarks/results/subspace_every.json

One process, one model a period, one optimizer step of each in turn; a ratio is of means over whole windows, so that
steps in which bases move are in it. Compiling, forward and backward are not: gradients are those of one backward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks import models
from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.rules import Oja


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", default="1,10", help="periods; ratios are to the first (default: %(default)s)")
    parser.add_argument("--model", default="smollm2", help="smollm2, or WIDTHxLAYERS")
    parser.add_argument("--layers", type=int, default=8, help="blocks of smollm2")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="steps of each, after one window; whole windows")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    periods = [int(text) for text in args.every.split(",")]
    for period in periods:
        if period < 1 or args.steps % period:
            parser.error(f"--every names {period}: it must be at least 1 and divide --steps ({args.steps})")
    args.dtype, args.device, args.vocabulary, args.batch, args.seq = "float32", "cpu", 8192, 1, 128
    runs = [Run(args, period) for period in periods]
    for _ in range(max(periods)):
        for run in runs:
            run.step()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(args.steps):
        for run, mine in zip(runs, seconds, strict=True):
            mine.append(run.step())
    means = [statistics.fmean(mine) for mine in seconds]
    rows = [
        {"every": period, "ratio": mean / means[0], "median": statistics.median(mine) / statistics.median(seconds[0])}
        for period, mean, mine in zip(periods, means, seconds, strict=True)
    ]
    for row in rows:
        print(f"every {row['every']}: {row['ratio']:.2f} of the time (the median step: {row['median']:.2f})")
    if args.out:
        settings = {**vars(args), "out": str(args.out)}
        result = {"settings": settings, "torch": torch.__version__, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


class Run:
    """A model with gradients and statistics that are put back before each step."""

    def __init__(self, args: argparse.Namespace, every: int) -> None:
        torch.manual_seed(0)
        model, batch = models.build(args)
        torch._dynamo.reset()
        model.compile(backend=oasis_backend(rank=args.rank, subspace=Oja(every=every), inner="aot_eager"))
        model(**batch).loss.backward()
        self.optimizer = OasisAdamW(model.parameters(), lr=1e-5)
        self.subspaces = {p.grad.subspace for p in model.parameters() if isinstance(p.grad, LowRankGrad)}
        self.given = [(s, s.statistic, s.energy_sum) for s in self.subspaces]
        self.low_rank = [(p, p.grad) for p in model.parameters() if isinstance(p.grad, LowRankGrad)]

    def step(self) -> float:
        for subspace, statistic, energy in self.given:
            subspace.statistic, subspace.energy_sum = statistic.clone(), energy.clone()
        for weight, g in self.low_rank:  # of the basis as it is now: the optimizer refuses a stale one
            weight.grad = LowRankGrad(g.factor, g.subspace, weight, features=g.features)
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
