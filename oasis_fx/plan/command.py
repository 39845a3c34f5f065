"""The command line of ``oasis-fx plan``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from oasis_fx.memory.node_costs import readable_bytes
from oasis_fx.memory.sizes import parse_bytes
from oasis_fx.plan.devices import Device, find_device
from oasis_fx.settings import Settings

if TYPE_CHECKING:
    from oasis_fx.plan.methods import Planner, Row

DTYPES = ("bfloat16", "float32", "float16")
MODEL = "Llama-2-7B, Llama-3.1-8B, Llama-3.2-1B, Qwen3-0.6B/4B/8B, SmolLM2-135M; a folder with config.json; or a "
MODEL += "repository in the cache of transformers"
_ORDERED_BY = "H100"  # whose times order the settings of --fit, where no --time is given


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``plan`` to a parser, but for rank and budget."""
    command.add_argument("model", help=MODEL)
    add_sizes(command)
    command.add_argument("--lora-rank", type=_whole, default=32, metavar="R", help="of the row of LoRA (default: 32)")
    command.add_argument("--galore-rank", type=_whole, default=128, metavar="R", help="of GaLore's (default: 128)")
    command.add_argument("--loss", choices=("full", "chunked"), default="full", help="whether all logits exist at once")
    command.add_argument(
        "--fit", metavar="SIZE", help="24GiB: the largest batch of each, and which of our settings fit"
    )
    command.add_argument("--time", metavar="DEVICE", help="H100, H200, A100, RTX-4090, L4 or cpu: predict ms of a step")
    command.add_argument("--chart", metavar="FILE", help="a stacked bar chart: .svg or .png")
    command.add_argument("--json", metavar="FILE", help="the figures, in bytes")


def add_sizes(command: argparse._ActionsContainer) -> None:
    """Add the sizes of a model that is known by its name; each is None where it is not given."""
    command.add_argument("--batch", type=_whole, metavar="N", help="samples a step (default: 1)")
    command.add_argument("--seq", type=_whole, metavar="N", help="tokens a sample (default: 2048, or all positions)")
    command.add_argument("--blocks", type=_whole, metavar="N", help="blocks, where all of the model's are not wanted")
    command.add_argument("--vocabulary", type=_whole, metavar="N", help="its size, where the model's own is not wanted")
    command.add_argument("--dtype", choices=DTYPES, help=f"of weights and activations (default: {DTYPES[0]})")


def run(args: argparse.Namespace, settings: Settings, tell: Callable[[str], object] = lambda what: None) -> str:
    """Return the plan as text.

    Args:
        tell: is called with a few words ahead of what takes long.

    Raises:
        ValueError: the model or the device is not known, the size is none, the chart cannot be drawn.
    """
    limit = None if args.fit is None else parse_bytes(args.fit)
    if args.fit is not None and not limit:
        raise ValueError(f"--fit is {args.fit!r}: it must be a size such as '24GiB'")
    device = None if args.time is None else find_device(args.time)
    if args.chart:
        from oasis_fx.plan.chart import check_chart

        check_chart(args.chart)

    planner = _planner(args, settings, tell)
    rows, title = planner.rows(limit, device), _title(args, planner)
    parts = [title, _sizes(rows, limit), _largest(rows)]
    if device is not None:
        parts.append(_times(rows, device))
    fits = None
    if limit is not None:
        from oasis_fx.plan.fit import as_text, search

        ordered_by = device or find_device(_ORDERED_BY)
        stock = planner.time(planner.methods()[rows[0].name], ordered_by)
        fits, least = search(planner, limit, ordered_by, stock)
        parts.append(as_text(fits, least, planner, args.fit, ordered_by))
    if args.json:
        record = {
            "title": title,
            "limit": limit,
            "device": device and device.name,
            "methods": [_record(row, rows[0]) for row in rows],
            "fits": None if fits is None else [choice.record(planner) for choice in fits],
        }
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.chart:
        from oasis_fx.plan.chart import draw_chart

        draw_chart(rows, title, args.chart, limit)
    return "\n\n".join(parts) + "\n"


def _planner(args: argparse.Namespace, settings: Settings, tell: Callable[[str], object]) -> Planner:
    import torch  # late, as these: they load the compiler

    from oasis_fx.plan.configs import load_config
    from oasis_fx.plan.methods import Planner

    tell("loading transformers")
    config = load_config(args.model, args.blocks, args.vocabulary)
    return Planner(
        config,
        args.batch or 1,
        seq_of(config, args.seq),
        getattr(torch, args.dtype or DTYPES[0]),
        settings,
        lora_rank=args.lora_rank,
        galore_rank=args.galore_rank,
        chunked=args.loss == "chunked",
        tell=tell,
    )


def seq_of(config: Any, seq: int | None) -> int:
    """Return how many tokens a sample has: as many as are asked for, or 2048, or as many as the model has positions.

    Raises:
        ValueError: more are asked for than the model has positions.
    """
    most = getattr(config, "max_position_embeddings", None) or 2048
    if seq is not None and seq > most:
        raise ValueError(f"--seq is {seq}: the model has {most} positions, give that many at most")
    return min(2048, most) if seq is None else seq


def _title(args: argparse.Namespace, planner: Planner) -> str:
    sizes = "" if args.blocks is None else f"{args.blocks} blocks, "
    sizes += "" if args.vocabulary is None else f"vocabulary {args.vocabulary}, "
    tokens, dtype = f"{planner.batch} x {planner.seq} tokens", str(planner.dtype).removeprefix("torch.")
    return f"{args.model}, {sizes}{dtype}, {tokens}, rank {planner.settings.rank}, {args.loss} loss"


def _sizes(rows: Sequence[Row], limit: int | None) -> str:
    """The table of memory at the peak, and of the largest batches where there is a limit."""
    from oasis_fx.plan.memory import KINDS
    from oasis_fx.plan.methods import unit_of

    unit, name = unit_of(rows)
    lines = []
    for row in rows:
        sizes = [f"{row.memory.bytes_of[kind] / unit:.2f}" for kind in KINDS]
        fits = [] if limit is None else [str(row.largest_batch or "none")]
        lines.append([row.name, *sizes, f"{row.memory.total / unit:.2f}", row.memory.phase, *fits])
    headers = [f"{name} at the peak", *KINDS, "sum", "in", *([] if limit is None else ["largest batch"])]
    return tabulate(lines, headers, tablefmt="simple", disable_numparse=True)


def _largest(rows: Sequence[Row]) -> str:
    """The table of the largest tensors at the peak of each row."""
    lines = []
    for row in rows:
        first, *others = [f"{readable_bytes(size)} {what}" for what, size in row.memory.largest] or ["none"]
        lines += [[row.name, first], *(["", other] for other in others)]
    return tabulate(lines, ["largest tensors at the peak", "beside weights and states"], tablefmt="simple")


def _record(row: Row, stock: Row) -> dict[str, Any]:
    """What is written to a file of one row: bytes, seconds, and the ratio of the step to stock's."""
    found: dict[str, Any] = {
        "method": row.name,
        "bytes": dict(row.memory.bytes_of),
        "phase": row.memory.phase,
        "largest": [{"tensor": what, "bytes": size} for what, size in row.memory.largest],
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


def _whole(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be a whole number from 1")
    return number
