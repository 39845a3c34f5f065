"""Where a step's time goes on a GPU: the kernels of forward and backward, and those of the optimizer step.

python -m benchmarks.profile_step --contender oasis --model 2048x8 --batch 8 --seq 2048 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, models

ACTIVITIES = [ProfilerActivity.CPU, ProfilerActivity.CUDA]


def main() -> None:
    args = _parse()
    contender = harness.Contender(args.contender, args)
    model, batch, optimizer = contender.model, contender.batch, contender.optimizer
    for _ in range(4):
        print({part: round(seconds, 4) for part, seconds in contender.turn().items()}, flush=True)
    with profile(activities=ACTIVITIES) as passes:
        model(**batch).loss.backward()
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    print(f"optimizer step: {1000 * host:.1f} ms of the host, {1000 * (time.perf_counter() - start):.1f} ms in all")
    model(**batch).loss.backward()
    with profile(activities=ACTIVITIES) as step:
        optimizer.step()
        torch.cuda.synchronize()
    for title, found in (("forward and backward", passes), ("optimizer step", step)):
        print(f"\n{title}\n{found.key_averages().table(sort_by='self_cuda_time_total', row_limit=40)}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", default="oasis")
    parser.add_argument("--model", default="2048x8", help=models.NAMES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--matmul-precision", default="highest")
    return argparse.Namespace(**vars(parser.parse_args()), device="cuda")


if __name__ == "__main__":
    main()
