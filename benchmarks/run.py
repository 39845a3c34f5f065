"""A whole training step, contender against contender: seconds, memory, compile time.

    python -m benchmarks.run --model 1024x4 --batch 8 --seq 512 --out benchmarks/results
    python -m benchmarks.run --model llama-1b --dtype bfloat16 --device cuda --batch 4 --seq 4096 --out results
    python -m benchmarks.run --grow seq=256,512,1024 --grow rank=16,64,256 --model 512x4 --contenders stock,oasis

Contenders: see benchmarks/contenders.py; the first is what all ratios are to. How it is measured: see
benchmarks/harness.py.
Writes NAME.json, NAME.md and NAME.svg with --out.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from benchmarks import contenders, harness, models, plots, tables

DEFAULT = ("stock", "stock-recompute", "oasis", "oasis-budget0.5", "oasis-budget0.3", "oasis-budget0.1")


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.grow:
        _grow(args)
        return
    results = _run(args, _name(args))
    if args.out:
        plots.plane(results, _title(args), args.out / f"{_name(args)}.svg")


def _run(args: argparse.Namespace, name: str) -> dict[str, Any]:
    def save(results: dict[str, Any]) -> None:
        if args.out:
            settings = {k: v if not isinstance(v, Path) else str(v) for k, v in vars(args).items()}
            record = {"settings": settings, "title": _title(args), "results": results}
            (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")

    results = harness.measure(args, save)
    note = f"ratios to {args.contenders[0]}, medians of {args.steps} steps"
    text = f"{_title(args)}; {note}\n\n{tables.table(results)}\n\n{tables.aims(results)}\n"
    print(f"\n{text}", flush=True)
    if args.out and not args.grow:
        (args.out / f"{name}.md").write_text(text)
    return results


def _grow(args: argparse.Namespace) -> None:
    series: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    rows = []
    for size, values in args.grow:
        for value in values:
            changed = argparse.Namespace(**vars(args))
            if size in ("width", "depth"):
                width, layers = args.model.split("x")
                changed.model = f"{value}x{layers}" if size == "width" else f"{width}x{value}"
            else:
                setattr(changed, size, value)
            changed.label = f"growth-{size}{value}"
            results = _run(changed, _name(changed))
            series.setdefault(size, []).append((value, results))
            for name, own in tables.ratios(results).items():
                rows.append([size, value, name, f"{own['step']:.2f}", f"{own['peak']:.2f}", f"{own['saved']:.2f}"])
    headers = ["size", "", "contender", "step", "peak", "saved"]
    args.label = "growth"
    text = f"{_title(args)}; one size changed at a time\n\n{tables.tabulate(rows, headers, tablefmt='github')}\n"
    print(text)
    if args.out:
        (args.out / f"{_name(args)}.md").write_text(text)
        plots.growth(series, _title(args), args.out / f"{_name(args)}.svg")


def _name(args: argparse.Namespace) -> str:
    kind = "gpu" if args.device == "cuda" else "cpu"
    return f"{args.label}-{args.model}-{args.dtype}-{args.batch}x{args.seq}-r{args.rank}-{kind}"


def _title(args: argparse.Namespace) -> str:
    import torch

    device = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    what = f"{args.model} {args.dtype}, {args.batch} x {args.seq} tokens, rank {args.rank}"
    return f"{what}; {device}, torch {torch.__version__}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1024x4", help=models.NAMES)
    parser.add_argument("--layers", type=int, help="blocks, where the model's own number is not wanted")
    parser.add_argument("--vocabulary", type=int, help="of a Llama; by default its own, and 1024 for WIDTHxLAYERS")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--matmul-precision", default="highest")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each contender")
    parser.add_argument("--contenders", type=_names, default=list(DEFAULT), help="by commas")
    parser.add_argument("--together", type=int, default=7, help="contenders in memory at once")
    parser.add_argument("--grow", action="append", type=_size, metavar="SIZE=A,B,C",
                        help="batch, seq, rank, width or depth; repeatable")  # fmt: skip
    parser.add_argument("--label", default="step", help="first part of the files' names")
    parser.add_argument("--out", type=Path, help="folder for the results")
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        try:
            contenders.parse(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return names


def _size(text: str) -> tuple[str, list[int]]:
    size, _, values = text.partition("=")
    if size not in ("batch", "seq", "rank", "width", "depth") or not values:
        raise argparse.ArgumentTypeError(f"{text!r}: give batch, seq, rank, width or depth, and values: seq=256,512")
    return size, [int(value) for value in values.split(",")]


if __name__ == "__main__":
    main()
