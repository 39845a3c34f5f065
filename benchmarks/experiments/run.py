"""The experiments on learning quality; each run is kept, so that one may stop at any time and go on.

    python -m benchmarks.experiments.run scratch                          # every method, from scratch, on bytes
    python -m benchmarks.experiments.run scratch --methods adamw,oja --steps 200 --seeds 1 --limit-hours 0.5
    python -m benchmarks.experiments.run sweep                            # subspace_lr, rank, period
    python -m benchmarks.experiments.run finetune                         # SmolLM2-135M on grade-school maths
    python -m benchmarks.experiments.run finetune --methods oasis,lora --rank 64
    python -m benchmarks.experiments.run sizes                            # what each method keeps, at the same sizes
    python -m benchmarks.experiments.run figures --steps 300 --longer 10  # drawings, and one file with all runs

Runs lie in runs/experiments; the end of each part writes benchmarks/results/experiments-PART.json and .md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.experiments import corpus, figures, finetuning, methods, scratch, sizes, sweep, training
from benchmarks.experiments.runs import Runs, Settings

ROOT = Path(__file__).parents[2]


FIXED = ("model", "data", "rank", "steps", "batch", "length", "device", "inner")


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    if args.part == "figures":
        print(*figures.draw(args.runs, args.out, steps=args.steps, longer=max(args.longer, 1)), sep="\n")
        return
    if args.part == "finetune":
        _finetune(args)
        return
    if args.part == "sizes":
        fixed = {key: getattr(args, key) for key in FIXED if key not in ("data", "steps")}
        _report(args, fixed, sizes.table(args.methods, **fixed), sizes.HEADERS)
        return
    runs = Runs(args.runs, training.train, figures.kept(args.out) if args.kept else ())
    fixed = {key: getattr(args, key) for key in FIXED} | ({"rank_scaling": True} if args.rank_scaling else {})
    if args.part == "sweep":
        _do(runs, lambda: sweep.plan(args.lrs, args.seeds, **fixed), args.limit_hours)
        _report(args, fixed, sweep.table(runs.known, args.lrs, args.seeds, **fixed), sweep.HEADERS)
        return
    chosen = runs.known, args.methods
    _do(runs, lambda: scratch.plan(*chosen, args.seeds, args.lrs, **fixed), args.limit_hours)
    if args.longer > 1:
        _do(runs, lambda: scratch.longer(*chosen, args.lrs, args.longer, **fixed), args.limit_hours)
    _report(
        args, fixed, scratch.table(*chosen, args.seeds, args.lrs, args.against, **fixed), scratch.headers(args.against)
    )


def _finetune(args: argparse.Namespace) -> None:
    runs = Runs(args.runs, finetuning.train, figures.kept(args.out) if args.kept else ())
    given = {"steps": args.steps, "device": args.device, "inner": args.inner}
    named = methods.FINETUNED if args.methods == list(methods.METHODS) else args.methods
    chosen = tuple(p for p in finetuning.POINTS if p[0] in named and args.rank in (None, p[1]))
    if not chosen:
        raise ValueError(f"no run of {', '.join(named)} at rank {args.rank}: of {finetuning.POINTS} none is left")
    _do(runs, lambda: finetuning.plan(args.seeds, chosen, **given), args.limit_hours)
    _report(args, given, finetuning.table(runs.known, args.seeds, chosen, **given), finetuning.HEADERS)


def _do(runs: Runs, plan: Any, limit_hours: float) -> None:
    """Do what a plan asks for and is not there; a plan is asked again after each run, since it goes by results."""
    end = time.monotonic() + limit_hours * 3600
    bar = tqdm(unit="run")
    while time.monotonic() < end:
        waiting = _waiting(runs, plan())
        bar.total = bar.n + len(waiting)
        if not waiting:
            break
        s = waiting[0]
        bar.set_description(f"{s['method']} lr {s['lr']:g} seed {s['seed']}")
        result = runs.result(s)
        bar.set_postfix(loss=f"{result.get('loss', result.get('heldout_after')):.4f}")
        bar.update()
    bar.close()


def _waiting(runs: Runs, plan: Iterable[Settings]) -> list[Settings]:
    return [s for s in plan if runs.known(s) is None]


def _report(args: argparse.Namespace, fixed: dict[str, Any], rows: list[Any], headers: list[str]) -> None:
    name = f"experiments-{args.part}-{args.steps}"
    if args.part == "sizes":
        name = f"experiments-sizes-{args.model}-r{args.rank}"
    elif args.part != "finetune":
        name = f"experiments-{args.part}-{args.model}-{args.data}-{args.steps}-r{args.rank}"
        name += "" if args.rank_scaling else "-unscaled"
    short = [[f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row] for row in rows]  # strings stay
    text = f"{json.dumps(fixed)}\n\n{tabulate(short, headers, tablefmt='github', disable_numparse=True)}\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}.json").write_text(json.dumps({"settings": fixed, "headers": headers, "rows": rows}) + "\n")
        (args.out / f"{name}.md").write_text(text)


def _rank(text: str) -> int | float | str:
    return text if text.startswith("auto:") else float(text) if "." in text else int(text)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("scratch", "sweep", "finetune", "sizes", "figures"))
    parser.add_argument("--methods", type=lambda text: methods.known(text.split(",")), default=list(methods.METHODS))
    parser.add_argument("--no-rank-scaling", dest="rank_scaling", action="store_false", help="of our optimizers")
    parser.add_argument("--model", choices=("small", "10m"), default="small")
    parser.add_argument("--data", choices=corpus.NAMES, default="shakespeare")
    parser.add_argument(
        "--rank", type=_rank, help="columns, a fraction of n, or auto:FRACTION; default 64, for finetune all its ranks"
    )
    parser.add_argument("--steps", type=int, help="default: 300, or 100 for finetune")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3, help="at the best learning rate; the grid has one")
    parser.add_argument("--lrs", type=lambda text: [float(x) for x in text.split(",")], help="in place of the methods'")
    parser.add_argument("--against", choices=methods.METHODS, default="adamw", help="losses are compared with, by seed")
    parser.add_argument("--longer", type=int, default=1, help="then the best three and adamw so many times longer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--inner", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--limit-hours", type=float, default=2.0, help="start no run after this")
    parser.add_argument("--kept", action="store_true", help="what is in experiments-runs.json counts as done")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "experiments")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    args.steps = args.steps or (100 if args.part == "finetune" else 300)
    if args.rank is None and args.part != "finetune":
        args.rank = 64
    return args


if __name__ == "__main__":
    main()
