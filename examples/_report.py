"""What a comparison prints and draws."""

from __future__ import annotations

import json
import platform
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

KINDS = ("weights", "gradients", "optimizer", "saved_activations")
MIB = 2**20


def summarize(results: dict[str, dict[str, Any]]) -> str:
    """One table, a method a column. Sizes are of real tensors; the median leaves out the first step, which compiles."""
    rows: list[list[Any]] = [
        ["held-out loss before", *(f"{r['heldout_before']:.4f}" for r in results.values())],
        ["held-out loss after", *(f"{r['heldout_after']:.4f}" for r in results.values())],
    ]
    for kind in KINDS:
        rows.append([f"{kind.replace('_', ' ')}, MiB", *(f"{r['sizes'][kind] / MIB:.1f}" for r in results.values())])
    rows.append(["sum of these, MiB", *(f"{_total(r) / MIB:.1f}" for r in results.values())])
    rows.append(["peak memory of the process, MiB", *(f"{r['peak_bytes'] / MIB:.0f}" for r in results.values())])
    rows.append(["seconds a step, median", *(f"{_median(r):.3f}" for r in results.values())])
    rows.append(["first step with compiling, s", *(f"{r['seconds'][0]:.1f}" for r in results.values())])
    rows.append(["weights with low-rank gradients", *(r["sizes"]["rewritten"] for r in results.values())])
    return tabulate(
        rows,
        headers=["", *results],
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", *["right"] * len(results)),
    )


def conclude(results: dict[str, dict[str, Any]]) -> str:
    """Read the table in a few sentences: the first method beside each other one."""
    (name, first), *others = results.items()
    if not others:
        before, after = first["heldout_before"], first["heldout_after"]
        return f"{name} takes the held-out loss from {before:.3f} to {after:.3f} in {len(first['losses'])} steps."
    found = []
    for other, second in others:
        loss = first["heldout_after"] / second["heldout_after"]
        seconds, peak = _median(first) / _median(second), first["peak_bytes"] / second["peak_bytes"]
        end = f"ends {100 * abs(loss - 1):.1f} % {'above' if loss > 1 else 'below'} {other}'s held-out loss"
        found.append(f"{name} {end}, in {seconds:.2f} of its time a step and {peak:.2f} of its peak memory.")
        if name == "oasis" and loss > 1.01:
            found.append("A larger --rank, or a --tail, leaves out less of each gradient (docs/results.md).")
    return "\n".join(dict.fromkeys(found))


def write_json(file: Path, args: Namespace, results: dict[str, dict[str, Any]]) -> None:
    settings = {key: value for key, value in vars(args).items() if isinstance(value, str | int | float | None)}
    machine = {
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    text = json.dumps({"settings": settings, "machine": machine, "results": results}, indent=1)
    file.write_text(text + "\n")


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def draw(file: Path, args: Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Loss curves, and bars of what occupies memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for method, result in results.items():
        (line,) = curves.plot(range(1, len(result["losses"]) + 1), result["losses"], label=f"{method}, training")
        curves.plot(
            *zip(*result["heldout"], strict=True),
            "o--",
            color=line.get_color(),
            alpha=0.6,
            label=f"{method}, held-out",
        )
    curves.set(xlabel="step", ylabel="loss", title=f"{args.model}, {args.batch_size} x {args.seq_len} tokens a step")
    curves.legend()
    bottom = [0.0] * len(results)
    for kind in KINDS:
        heights = [result["sizes"][kind] / MIB for result in results.values()]
        bars.bar(list(results), heights, bottom=bottom, label=kind.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for index, top in enumerate(bottom):
        bars.annotate(f"{top:.0f}", (index, top), ha="center", va="bottom")
    bars.set(ylabel="MiB of real tensors", title="memory by kind")
    bars.margins(y=0.1)
    bars.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _median(result: dict[str, Any]) -> float:
    return statistics.median(result["seconds"][1:] or result["seconds"])


def _total(result: dict[str, Any]) -> int:
    return sum(result["sizes"][kind] for kind in KINDS)
