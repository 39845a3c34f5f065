"""What `oasis-fx plan` predicts beside what is measured: peak memory on the CPU, each in a process of its own.

python -m benchmarks.plan_check --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import harness, models

CASES = (("512x6", 8, 256), ("1024x4", 4, 512), ("smollm2", 4, 256))
CONTENDERS = {"stock": 1.0, "stock-budget0.3": 0.3, "oasis": 1.0, "oasis-budget0.3": 0.3, "oasis-budget0.1": 0.1}


def predicted(args: argparse.Namespace) -> dict[str, int]:
    """Peak bytes by contender."""
    import torch
    from transformers import LlamaConfig

    from oasis_fx.plan.memory import peak
    from oasis_fx.plan.methods import Planner
    from oasis_fx.settings import Settings

    config = LlamaConfig(**models.llama(args), use_cache=False)
    planner = Planner(config, args.batch, args.seq, getattr(torch, args.dtype), Settings(rank=args.rank))
    found = {}
    for name, share in CONTENDERS.items():
        measured = planner.stock(share) if name.startswith("stock") else planner.oasis(share)
        found[name] = peak(*measured).total
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    given = parser.parse_args()
    rows, raw = [], []
    for model, batch, seq in CASES:
        args = argparse.Namespace(model=model, batch=batch, seq=seq, rank=32, layers=None, vocabulary=None)
        args.dtype, args.device, args.matmul_precision = "float32", "cpu", "highest"
        expected = predicted(args)
        for name in CONTENDERS:
            measured = _measured(name, args)
            ratio = expected[name] / measured
            rows.append([model, f"{batch} x {seq}", name, f"{expected[name] / 2**20:.0f}", f"{measured / 2**20:.0f}",
                         f"{ratio:.2f}"])  # fmt: skip
            raw.append({"model": model, "batch": batch, "seq": seq, "contender": name, "predicted": expected[name],
                        "measured": measured})  # fmt: skip
            print(*rows[-1], flush=True)
    headers = ["model", "tokens", "", "predicted MiB", "measured MiB", "ratio"]
    text = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    print(f"\n{text}")
    if given.out:
        (given.out / "plan-check-cpu.json").write_text(json.dumps(raw, indent=1) + "\n")
        (given.out / "plan-check-cpu.md").write_text(f"{text}\n")


def _measured(name: str, args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        worker = harness.Worker(name, args, folder, harness.LARGE_BLOCKS_COME_AND_GO)
        started: Any = worker.start()
        if "error" in started:
            raise RuntimeError(started["error"])
        found = worker.ask("peak")
        worker.stop()
    return int(found)


if __name__ == "__main__":
    main()
