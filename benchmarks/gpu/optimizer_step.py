"""The optimizer step alone, ours beside torch's fused AdamW: time of the host and of the GPU, launches, host reads.

    python -m benchmarks.gpu.optimizer_step --out FOLDER [--device cpu --tiny]

Gradients come from a pass over a few tokens, since a step does not depend on how many there were. Weights are bfloat16.
Of `STEPS` steps, each alone between two synchronisations, the medians of: ``host_ms``, until `step` returns;
``span_ms``, on the GPU's clock, from before the step to its end, waits for the host included. Of one more step under
torch's profiler: ``busy_ms``, the sum over its kernels, and ``launches``; ``longest`` has the kernels that take the
most of it. Of another one: ``waits``, operations that made the host wait for the GPU
(`torch.cuda.set_sync_debug_mode`).
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from argparse import Namespace
from typing import Any

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from benchmarks import models
from benchmarks.gpu.arguments import parser
from benchmarks.gpu.record import Record
from oasis_fx import OasisAdamW, oasis_backend

CASES = (("2048x8", None, 32), ("2048x8", None, 128), ("llama-8b", 4, 32), ("llama-8b", 4, 128))
TINY = (("64x2", None, 8),)
STEPS = 9


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cases", type=int, nargs="*", help="places of some of the cases alone")
    args = arguments.parse_args()
    record = Record(args.out, "optimizer_step", args.device)
    cases = TINY if args.tiny else [CASES[place] for place in args.cases or range(len(CASES))]
    for model, layers, rank in cases:
        found = {}
        for name in ("stock", "oasis"):
            found[name] = _measure(name, model, layers, rank, args.device)
            _free(args.device)
        record.add({"model": model, "layers": layers, "rank": rank, **found})
        rows = [
            [name, *(f"{v:.2f}" for v in values.values() if isinstance(v, int | float))]
            for name, values in found.items()
        ]
        print(f"{model}, {layers or 'all'} blocks, rank {rank}")
        print(tabulate(rows, ["", *found["oasis"]], tablefmt="github"), flush=True)


def _measure(name: str, size: str, layers: int | None, rank: int, device: str) -> dict[str, Any]:
    args = Namespace(model=size, layers=layers, vocabulary=1024, batch=1, seq=64, dtype="bfloat16", device=device)
    model, batch = models.build(args)
    torch._dynamo.reset()
    if name == "oasis":
        model.compile(backend=oasis_backend(rank=rank, inner="aot_eager"))
        optimizer: torch.optim.Optimizer = OasisAdamW(model.parameters(), lr=1e-5)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def compute_gradients() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        _wait(device)

    for _ in range(3):  # the states are made, and kernels built
        compute_gradients()
        optimizer.step()
    times = []
    for _ in range(STEPS):
        compute_gradients()
        times.append(_timed(optimizer, device))
    compute_gradients()
    launches, busy, longest = _profiled(optimizer, device)
    compute_gradients()
    waits = _waits(optimizer, device)
    host, span = (statistics.median(column) for column in zip(*times, strict=True))
    return {"host_ms": host, "span_ms": span, "busy_ms": busy, "launches": launches, "waits": waits,
            "longest": longest}  # fmt: skip


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(optimizer: torch.optim.Optimizer, device: str) -> tuple[float, float]:
    if device != "cuda":
        start = time.perf_counter()
        optimizer.step()
        return (1000 * (time.perf_counter() - start),) * 2
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    start = time.perf_counter()
    optimizer.step()
    host = 1000 * (time.perf_counter() - start)
    end.record()
    torch.cuda.synchronize()
    return host, begin.elapsed_time(end)


def _profiled(optimizer: torch.optim.Optimizer, device: str) -> tuple[int, float, dict[str, tuple[int, float]]]:
    """Number and total milliseconds of what the GPU ran, and both by name for the longest."""
    if device != "cuda":
        optimizer.step()
        return 0, 0.0, {}
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        optimizer.step()
        torch.cuda.synchronize()
    ran = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    by_name: dict[str, list[float]] = {}
    for event in ran:
        by_name.setdefault(event.name[:100], []).append(event.device_time_total / 1000)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:25]
    found_times = {name: (len(times), round(sum(times), 4)) for name, times in longest}
    return len(ran), sum(event.device_time_total for event in ran) / 1000, found_times


def _waits(optimizer: torch.optim.Optimizer, device: str) -> int:
    if device != "cuda":
        optimizer.step()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


if __name__ == "__main__":
    main()
