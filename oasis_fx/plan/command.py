"""The command line of ``oasis-fx plan``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tabulate import tabulate

from oasis_fx.memory.sizes import parse_bytes
from oasis_fx.settings import Settings

DTYPES = ("bfloat16", "float32", "float16")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``plan`` to a parser, but for rank and budget."""
    command.add_argument(
        "model", help="Llama-2-7B, Llama-3.1-8B, Qwen3-0.6B/4B/8B, SmolLM2-135M; a folder with config.json"
    )
    command.add_argument("--batch", type=_whole, default=1, metavar="N", help="samples a step (default: 1)")
    command.add_argument("--seq", type=_whole, default=2048, metavar="N", help="tokens a sample (default: 2048)")
    command.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of weights and activations")
    command.add_argument("--lora-rank", type=_whole, default=32, metavar="R")
    command.add_argument("--galore-rank", type=_whole, default=128, metavar="R")
    command.add_argument("--loss", choices=("full", "chunked"), default="full", help="whether all logits exist at once")
    command.add_argument("--fit", metavar="SIZE", help="24GiB: the largest batch of each, and our largest budget")
    command.add_argument("--chart", metavar="FILE", help="a stacked bar chart: .svg or .png")
    command.add_argument("--json", metavar="FILE", help="the figures, in bytes")


def run(args: argparse.Namespace, settings: Settings) -> str:
    """Return the plan as text.

    Raises:
        ValueError: the model is not known, the size is none, the chart cannot be drawn.
    """
    limit = None if args.fit is None else parse_bytes(args.fit)
    if args.fit is not None and not limit:
        raise ValueError(f"--fit is {args.fit!r}: it must be a size such as '24GiB'")

    from oasis_fx.plan.configs import load_config  # late: these load the compiler

    config = load_config(args.model)

    import torch

    from oasis_fx.plan.memory import KINDS
    from oasis_fx.plan.methods import Planner

    planner = Planner(
        config,
        args.batch,
        args.seq,
        getattr(torch, args.dtype),
        settings,
        lora_rank=args.lora_rank,
        galore_rank=args.galore_rank,
        chunked=args.loss == "chunked",
    )
    rows = planner.rows(limit)
    title = f"{args.model}, {args.dtype}, {args.batch} x {args.seq} tokens, rank {settings.rank}, {args.loss} loss"
    lines = []
    for row in rows:
        sizes = [f"{row.memory.bytes_of[kind] / 2**30:.2f}" for kind in KINDS]
        fits = [] if limit is None else [str(row.largest_batch or "none")]
        lines.append([row.name, *sizes, f"{row.memory.total / 2**30:.2f}", row.memory.phase, *fits])
    headers = ["GiB at the peak", *KINDS, "sum", "in", *([] if limit is None else ["largest batch"])]
    parts = [title, tabulate(lines, headers, tablefmt="simple", disable_numparse=True)]
    best = None
    if limit is not None:
        best = planner.largest_budget(limit)
        parts.append(_fits(best, args))
    if args.json:
        found = [
            {
                "method": row.name,
                "bytes": dict(row.memory.bytes_of),
                "phase": row.memory.phase,
                "batch": row.largest_batch,
            }
            for row in rows
        ]
        record = {"title": title, "limit": limit, "methods": found, "largest_budget": best[0] if best else None}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.chart:
        from oasis_fx.plan.chart import draw_chart

        draw_chart(rows, title, args.chart, limit)
    return "\n\n".join(parts) + "\n"


def _fits(best: tuple[float, object] | None, args: argparse.Namespace) -> str:
    what = f"oasis_fx at {args.batch} x {args.seq} tokens in {args.fit}"
    if best is None:
        return f"{what}: does not fit under any budget; take fewer samples or tokens, or a lower rank"
    return f"{what}: fits with memory_budget={best[0]}"


def _whole(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be a whole number from 1")
    return number
