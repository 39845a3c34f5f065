"""Write docs/which_card.md: which settings of ours fit on which card, as `oasis-fx plan --fit` predicts it.

python -m benchmarks.which_card --model Llama-3.2-1B    plan one model for every card, and write the page anew
python -m benchmarks.which_card                         write the page anew from benchmarks/results/which_card.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from oasis_fx.plan.configs import BUILT_IN

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "which_card.md"
RESULT = ROOT / "benchmarks" / "results" / "which_card.json"
RANKS = {"SmolLM2-135M": 64, "Llama-3.2-1B": 128, "Qwen3-4B": 128, "Llama-3.1-8B": 256}
BATCH, SEQ = 4, 2048
# The size that is planned for, by the card's GiB. A tenth of the card stays free, for CUDA's own memory and for the
# planner's error.
FITS = {8: "7GiB", 12: "10.5GiB", 16: "14GiB", 24: "21GiB", 48: "43GiB", 80: "72GiB"}


def command_of(model: str, size: str) -> str:
    """The command whose output has a row of the page."""
    return f"oasis-fx plan {model} --batch {BATCH} --seq {SEQ} --rank {RANKS[model]} --loss chunked --fit {size}"


def planned(model: str, sizes: dict[int, str] = FITS) -> list[dict[str, Any]]:
    """Plan a model for cards; the graphs are made once for all of them."""
    import torch

    from oasis_fx.memory.sizes import parse_bytes
    from oasis_fx.plan.configs import load_config
    from oasis_fx.plan.devices import find_device
    from oasis_fx.plan.fit import search
    from oasis_fx.plan.memory import peak
    from oasis_fx.plan.methods import STOCK, Planner, largest_batch
    from oasis_fx.settings import Settings

    def tell(what: str) -> None:
        print(f"{model}: {what}", file=sys.stderr, flush=True)

    config, settings = load_config(model), Settings(rank=RANKS[model])
    planner = Planner(config, BATCH, SEQ, torch.bfloat16, settings, chunked=True, tell=tell)
    method, device, rows = planner.methods()[STOCK], find_device("H100"), []
    states, phases = planner.measure(method)
    for card, size in sizes.items():
        limit = parse_bytes(size)
        found, least = search(planner, limit, device, planner.time(method, device))
        stock = {"peak": peak(states, phases).total, "largest_batch": largest_batch(states, phases, BATCH, limit)}
        rank = max((choice.rank for choice in found), default=None)  # what learns best, before what is quickest
        choice = next((choice for choice in found if choice.rank == rank), least)
        rows.append({"card": card, "size": size, "fits": bool(found), "stock": stock, **choice.record(planner)})
    return rows


def table_of(model: str, rows: list[dict[str, Any]]) -> str:
    """The part of the page on one model."""
    lines = [
        f"### {model}",
        "",
        f"    {command_of(model, FITS[24])}",
        "",
        "| card | `--fit` | stock, largest batch | settings of ours | predicted peak | predicted time, to stock's |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak = f"{sum(row['bytes'].values()) / 2**30:.1f} GiB"
        stock = str(row["stock"]["largest_batch"] or "does not fit")
        what, time = _settings(row), f"{row['predicted_ratio']:.2f}"
        if not row["fits"]:
            what, time = f"none fits; the least that was tried is {what}", "-"
        lines.append(f"| {row['card']} GiB | {row['size']} | {stock} | {what} | {peak} | {time} |")
    return "\n".join(lines)


def _settings(row: dict[str, Any]) -> str:
    backend = [f"rank={row['rank']}"]
    backend += [] if row["tail"] is None else [f"tail={row['tail']}"]
    backend += [] if row["memory_budget"] == 1.0 else [f"memory_budget={row['memory_budget']}"]
    what = f"`{', '.join(backend)}`"
    what += "" if row["state_bits"] == 32 else ", `state_bits=8`"
    if row["backward_passes"] > 1:
        what += f", {row['backward_passes']} backward passes of {row['batch']}"
    return what if row["seq"] == SEQ else f"{what}, {row['seq']} tokens a sample"


def page_with(found: dict[str, list[dict[str, Any]]], page: str) -> str:
    """The page with the tables of what was planned, in the order of `RANKS`."""
    tables = "\n\n".join(table_of(model, found[model]) for model in RANKS if model in found)
    return re.sub(
        r"(<!-- tables: .*? -->\n).*?(?=\n<!-- end of the tables -->)",
        lambda begin: f"{begin[1]}\n{tables}\n",
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in BUILT_IN if name in RANKS], action="append", default=[])
    given = parser.parse_args()
    for model in given.model:
        rows = planned(model)
        found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        found[model] = rows
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page_with(json.loads(RESULT.read_text()), PAGE.read_text()))


if __name__ == "__main__":
    main()
