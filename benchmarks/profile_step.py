"""Where a step's time goes on a GPU: the kernels of forward and backward, and those of the optimizer step.

python -m benchmarks.profile_step --contender oasis --model 2048x8 --batch 8 --seq 2048 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, models


def main() -> None:
    args = _parse()
    contender = harness.Contender(args.contender, args)
    model, batch, optimizer = contender.model, contender.batch, contender.optimizer
    lines = [str({part: round(seconds, 4) for part, seconds in contender.turn().items()}) for _ in range(4)]
    on_gpu = args.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as passes:
        model(**batch).loss.backward()
        _wait(on_gpu)
    start = time.perf_counter()
    optimizer.step()
    host = time.perf_counter() - start
    _wait(on_gpu)
    in_all = time.perf_counter() - start
    lines.append(f"optimizer step: {1000 * host:.1f} ms of the host, {1000 * in_all:.1f} ms in all")
    optimizer.zero_grad()
    model(**batch).loss.backward()
    with profile(activities=activities) as step:
        optimizer.step()
        _wait(on_gpu)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    for title, found in (("forward and backward", passes), ("optimizer step", step)):
        lines.append(f"\n{title}\n{found.key_averages().table(sort_by=order, row_limit=40)}")
    text = "\n".join(lines)
    print(text, flush=True)
    if args.out:
        args.out.write_text(text + "\n")


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


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
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="a file to write it to as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
