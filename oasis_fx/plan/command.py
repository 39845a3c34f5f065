"""The command line of ``oasis-fx plan``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from oasis_fx.memory.sizes import parse_bytes
from oasis_fx.plan.devices import Device, find_device
from oasis_fx.settings import Settings

if TYPE_CHECKING:
    from oasis_fx.plan.methods import Planner, Row

DTYPES = ("bfloat16", "float32", "float16")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``plan`` to a parser, but for rank and budget."""
    command.add_argument(
        "model",
        help="Llama-2-7B, Llama-3.1-8B, Llama-3.2-1B, Qwen3-0.6B/4B/8B, SmolLM2-135M; a folder with config.json",
    )
    command.add_argument("--batch", type=_whole, default=1, metavar="N", help="samples a step (default: 1)")
    command.add_argument("--seq", type=_whole, default=2048, metavar="N", help="tokens a sample (default: 2048)")
    command.add_argument(
        "--blocks", type=_whole, metavar="N", help="blocks, where the model's own number is not wanted"
    )
    command.add_argument("--vocabulary", type=_whole, metavar="N", help="its size, where the model's own is not wanted")
    command.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of weights and activations")
    command.add_argument("--lora-rank", type=_whole, default=32, metavar="R")
    command.add_argument("--galore-rank", type=_whole, default=128, metavar="R")
    command.add_argument("--loss", choices=("full", "chunked"), default="full", help="whether all logits exist at once")
    command.add_argument("--fit", metavar="SIZE", help="24GiB: the largest batch of each, and our largest budget")
    command.add_argument("--time", metavar="DEVICE", help="H100, H200, A100, RTX-4090, L4 or cpu: predict ms of a step")
    command.add_argument("--chart", metavar="FILE", help="a stacked bar chart: .svg or .png")
    command.add_argument("--json", metavar="FILE", help="the figures, in bytes")


def run(args: argparse.Namespace, settings: Settings) -> str:
    """Return the plan as text.

    Raises:
        ValueError: the model or the device is not known, the size is none, the chart cannot be drawn.
    """
    limit = None if args.fit is None else parse_bytes(args.fit)
    if args.fit is not None and not limit:
        raise ValueError(f"--fit is {args.fit!r}: it must be a size such as '24GiB'")
    device = None if args.time is None else find_device(args.time)

    planner = _planner(args, settings)
    rows, title = planner.rows(limit, device), _title(args, settings)
    parts = [title, _sizes(rows, limit)]
    if device is not None:
        parts.append(_times(rows, device))
    best = None
    if limit is not None:
        best = planner.largest_budget(limit)
        parts.append(_fits(best, args))
    if args.json:
        record = {
            "title": title,
            "limit": limit,
            "device": device and device.name,
            "methods": [_record(row, rows[0]) for row in rows],
            "largest_budget": best[0] if best else None,
        }
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.chart:
        from oasis_fx.plan.chart import draw_chart

        draw_chart(rows, title, args.chart, limit)
    return "\n\n".join(parts) + "\n"


def _planner(args: argparse.Namespace, settings: Settings) -> Planner:
    import torch  # late, as these: they load the compiler

    from oasis_fx.plan.configs import load_config, with_blocks, with_vocabulary
    from oasis_fx.plan.methods import Planner

    config = load_config(args.model)
    config = config if args.blocks is None else with_blocks(config, args.blocks)
    config = config if args.vocabulary is None else with_vocabulary(config, args.vocabulary)
    return Planner(
        config,
        args.batch,
        args.seq,
        getattr(torch, args.dtype),
        settings,
        lora_rank=args.lora_rank,
        galore_rank=args.galore_rank,
        chunked=args.loss == "chunked",
    )


def _title(args: argparse.Namespace, settings: Settings) -> str:
    sizes = "" if args.blocks is None else f"{args.blocks} blocks, "
    sizes += "" if args.vocabulary is None else f"vocabulary {args.vocabulary}, "
    tokens = f"{args.batch} x {args.seq} tokens"
    return f"{args.model}, {sizes}{args.dtype}, {tokens}, rank {settings.rank}, {args.loss} loss"


def _sizes(rows: Sequence[Row], limit: int | None) -> str:
    """The table of memory at the peak, and of the largest batches where there is a limit."""
    from oasis_fx.plan.memory import KINDS

    lines = []
    for row in rows:
        sizes = [f"{row.memory.bytes_of[kind] / 2**30:.2f}" for kind in KINDS]
        fits = [] if limit is None else [str(row.largest_batch or "none")]
        lines.append([row.name, *sizes, f"{row.memory.total / 2**30:.2f}", row.memory.phase, *fits])
    headers = ["GiB at the peak", *KINDS, "sum", "in", *([] if limit is None else ["largest batch"])]
    return tabulate(lines, headers, tablefmt="simple", disable_numparse=True)


def _record(row: Row, stock: Row) -> dict[str, Any]:
    """What is written to a file of one row: bytes, seconds, and the ratio of the step to stock's."""
    found: dict[str, Any] = {
        "method": row.name,
        "bytes": dict(row.memory.bytes_of),
        "phase": row.memory.phase,
        "batch": row.largest_batch,
    }
    if row.time is not None and stock.time is not None:
        found["predicted_seconds"] = {"step": row.time.step, **asdict(row.time)}
        found["predicted_ratio"] = row.time.step / stock.time.step
    return found


def _times(rows: Sequence[Row], device: Device) -> str:
    """The table of predicted times; the first row is what ratios are to."""
    lines = []
    for row in rows:
        assert row.time is not None and rows[0].time is not None  # a device was given
        parts = (row.time.step, row.time.forward, row.time.backward, row.time.optimizer, row.time.host)
        ratio = row.time.step / rows[0].time.step
        lines.append([row.name, *(f"{1000 * seconds:.1f}" for seconds in parts), f"{ratio:.2f}"])
    title = f"predicted, not measured: ms of a step on {device.name}, by a roofline model"
    headers = ["", "step", "forward", "backward", "optimizer", "host", "to stock"]
    return f"{title}\n\n{tabulate(lines, headers, tablefmt='simple', disable_numparse=True)}"


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
