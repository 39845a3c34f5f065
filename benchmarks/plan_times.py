"""What `oasis-fx plan --time` predicts beside what was measured: times of steps, as ratios to stock, and peaks.

    python -m benchmarks.plan_times --out benchmarks/results     # on this CPU, in turns: 20 minutes or more
    python -m benchmarks.plan_times --committed gpu              # beside what is in benchmarks/results; or cpu
    python -m benchmarks.plan_times --kernels                    # predictions alone, by kind of kernel

Rates of the device ``cpu`` come from `benchmarks.device_rates`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import harness, models

CASES = (("1024x4", 4, 512), ("512x6", 4, 256))
ON_CPU = ("stock", "oasis", "oasis-budget0.3", "checkpoint")
RESULTS = Path("benchmarks/results")
COMMITTED = {
    "gpu": ("H200", ("gpu/2026-11-27-after/step-*.json",)),
    "cpu": ("cpu", ("step-1024x4-float32-4x512-*.json", "growth-depth8-*.json", "step-smollm2-*.json")),
}
PARTS = ("step", "forward", "backward", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--committed", choices=tuple(COMMITTED), help="measure nothing")
    parser.add_argument(
        "--kernels", action="store_true", help="measure nothing; predict for --model, by kind of kernel"
    )
    parser.add_argument("--model", help="one of those that are measured; by default all")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each contender")
    given = parser.parse_args()
    if given.kernels:
        for case in CASES:
            if given.model in (None, case[0]):
                show_kernels(*case)
    elif given.committed:
        device, patterns = COMMITTED[given.committed]
        files = [file for pattern in patterns for file in sorted(RESULTS.glob(pattern))]
        print(table([row for file in files for row in rows(json.loads(file.read_text()), device)]))
    else:
        measure_here(given)


def measure_here(given: argparse.Namespace) -> None:
    found = []
    for model, batch, seq in CASES:
        if given.model not in (None, model):
            continue
        args = settings(model, batch, seq, given.steps)
        record = {"settings": vars(args), "results": measure(args)}
        found += rows(record, "cpu")
        print(table(found), flush=True)
        if given.out:
            name = f"plan-times-{model}-{batch}x{seq}-cpu"
            (given.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Steps in turns, as `benchmarks.harness` takes them, but with one compile cache for all, and no peaks."""
    with tempfile.TemporaryDirectory() as cache:
        workers = {name: harness.Worker(name, args, cache) for name in args.contenders}
        found: dict[str, Any] = {name: worker.start() | {"steps": []} for name, worker in workers.items()}
        for number in range(args.steps + 1):
            for name, worker in workers.items():
                done = worker.ask("turn")
                if number >= 1:  # the first one warms up
                    found[name]["steps"].append(done)
        for worker in workers.values():
            worker.stop()
    for result in found.values():
        result["reference_steps"] = found["stock"]["steps"]
    return found


def rows(record: dict[str, Any], device: str) -> list[list[str]]:
    """Predicted beside measured, for each contender of a result of `benchmarks.run` that the plan knows."""
    args = argparse.Namespace(**record["settings"])
    if args.model == "smollm2":
        args.vocabulary = None  # what its record says was a default that this model did not take
    results = {name: result for name, result in record["results"].items() if row_of(name) is not None}
    expected = predicted(args, tuple(results), device)
    found = []
    for name, result in results.items():
        seconds = {part: statistics.median(step[part] for step in result["steps"]) for part in PARTS}
        measured = harness.medians(result)
        time, peak = expected[name]
        ratio = time.step / expected["stock"][0].step
        found.append([
            args.model, f"{args.batch} x {args.seq}", name,
            *(f"{1000 * getattr(time, part):.4g} / {1000 * seconds[part]:.4g}" for part in PARTS),
            f"{ratio:.2f} / {measured['step']:.2f}", f"{ratio / measured['step']:.2f}",
        ])  # fmt: skip
        if "sizes" in result:
            real = result["sizes"]["peak"]
            found[-1] += [f"{peak / 2**20:.0f} / {real / 2**20:.0f}", f"{peak / real:.2f}"]
    return found


def table(lines: Sequence[Sequence[str]]) -> str:
    headers = [
        "model",
        "tokens",
        "",
        *(f"{part}, ms" for part in PARTS),
        "to stock",
        "quotient",
        "peak, MiB",
        "quotient",
    ]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def row_of(contender: str) -> str | None:
    """The row of the plan that a contender of benchmarks.run is; None where there is none."""
    known = {"stock": "stock compile, AdamW", "checkpoint": "checkpointing", "lora32": "LoRA r=32", "oasis": "oasis"}
    method, _, budget = contender.partition("-budget")
    if not budget:
        return known.get(contender)
    return f"{method}, budget {budget}" if float(budget) in (0.5, 0.3, 0.1) else None


def predicted(args: argparse.Namespace, contenders: Sequence[str], device: str) -> dict[str, tuple[Any, int]]:
    """The time of a step, and its peak in bytes, by contender."""
    from oasis_fx.plan.devices import find_device
    from oasis_fx.plan.memory import peak

    planner, on = planner_for(args), find_device(device)
    methods = {name: planner.methods()[str(row_of(name))] for name in contenders}
    return {name: (planner.time(method, on), peak(*planner.measure(method)).total) for name, method in methods.items()}


def planner_for(args: argparse.Namespace) -> Any:
    """A planner for a model of `benchmarks.models`."""
    import torch
    from transformers import LlamaConfig

    from oasis_fx.plan.methods import Planner
    from oasis_fx.settings import Settings

    config = LlamaConfig(**models.llama(args), use_cache=False)
    return Planner(config, args.batch, args.seq, getattr(torch, args.dtype), Settings(rank=args.rank))


def settings(model: str, batch: int, seq: int, steps: int = 1) -> argparse.Namespace:
    return argparse.Namespace(
        model=model, batch=batch, seq=seq, rank=32, layers=None, vocabulary=None, dtype="float32", device="cpu",
        matmul_precision="highest", steps=steps, contenders=list(ON_CPU), together=len(ON_CPU),
    )  # fmt: skip


def show_kernels(model: str, batch: int, seq: int) -> None:
    """Print predicted seconds by kind of kernel, of three blocks."""
    from oasis_fx.plan.devices import find_device
    from oasis_fx.plan.fusion import kernels_of
    from oasis_fx.plan.roofline import kernel_seconds

    planner, device = planner_for(settings(model, batch, seq)), find_device("cpu")
    lines = []
    for name in ON_CPU:
        method = planner.methods()[str(row_of(name))]
        for phase, graph in zip(("forward", "backward"), planner.partitions.graphs(method), strict=True):
            sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
            for kernel in kernels_of(graph):
                amounts = (1, 1000 * kernel_seconds(kernel, device), kernel.flops / 1e9, kernel.num_bytes / 2**20)
                for at, amount in enumerate(amounts):
                    sums[kernel.kind.value][at] += amount
            lines += [[name, phase, kind, *amounts] for kind, amounts in sums.items()]
    print(tabulate(lines, ["", "", "", "kernels", "ms", "GFLOP", "MiB"], tablefmt="github", floatfmt=".4g"))


if __name__ == "__main__":
    main()
