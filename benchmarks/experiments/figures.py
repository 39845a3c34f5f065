"""Drawings of what the runs in a folder have found, and one file with all of them.

python -m benchmarks.experiments.run figures --steps 300 --longer 10
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.experiments.runs import key

matplotlib.use("svg")
import matplotlib.pyplot as plt

Run = dict[str, Any]
KEPT = "experiments-runs.json"


def draw(folder: Path, out: Path, *, steps: int, longer: int) -> list[Path]:
    """Write what the runs allow, those that ``out`` has from earlier machines among them; return the files."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / KEPT
    found = {key(run["settings"]): run for run in kept(out)}
    fresh = (json.loads(one.read_text()) for one in folder.glob("*.json"))
    found |= {key(run["settings"]): _summary(run) for run in fresh}
    runs = [found[name] for name in sorted(found)]
    file.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")  # a line a run
    made = [file]
    runs.sort(key=lambda run: (run["settings"]["method"], str(run["settings"]["rank"]).zfill(4)))  # as legends have it
    scratch = [run for run in runs if "part" not in run["settings"] and run["settings"]["data"] == "shakespeare"]
    small = [run for run in scratch if run["settings"]["model"] == "small"]
    for name, function, chosen in (
        ("curves", _curves, [r for r in small if r["settings"]["steps"] == steps * longer]),
        ("drift", _drift, [r for r in small if r["settings"]["steps"] == steps * longer]),
        ("subspace-lr", _rates, [r for r in small if r["settings"]["steps"] == steps]),
        ("rank", _ranks, [r for r in small if r["settings"]["steps"] == steps]),
        ("memory", _memory, [r for r in runs if r["settings"].get("part") == "finetune"]),
    ):
        figure, axes = plt.subplots(figsize=(6, 4))
        if function(axes, chosen):
            figure.tight_layout()
            made.append(out / f"experiments-{name}.svg")
            figure.savefig(made[-1], metadata={"Date": None})
        plt.close(figure)
    return made


def kept(out: Path) -> list[Run]:
    """All runs that were written there."""
    file = out / KEPT
    return json.loads(file.read_text()) if file.is_file() else []


def _summary(run: Run) -> Run:
    if "mean_drift" in run["result"]:
        return run  # taken from where it was summed up
    result = {key: value for key, value in run["result"].items() if key not in ("subspaces", "losses")}
    moves = run["result"].get("subspaces") or []
    result["mean_drift"] = [[step, _mean(drift for drift, _, _ in found)] for step, found in moves]
    result["mean_captured_energy"] = [[step, _mean(energy for _, energy, _ in found)] for step, found in moves]
    return {"settings": run["settings"], "result": result}


def _mean(values: Iterable[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _label(s: Run) -> str:
    return s["method"] if s["method"] in ("adamw", "sgd") else f"{s['method']}, r = {s['rank']}"


def _curves(axes: Any, runs: list[Run]) -> bool:
    for run in runs:
        axes.plot(*zip(*run["result"]["validation"], strict=True), label=_label(run["settings"]))
    axes.set(xlabel="step", ylabel="validation loss, nats a byte")
    axes.legend()
    return bool(runs)


def _drift(axes: Any, runs: list[Run]) -> bool:
    drawn = False
    for run in runs:
        points = [(step, value) for step, value in run["result"]["mean_drift"] if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=_label(run["settings"]))
            drawn = True
    axes.set(xlabel="step", ylabel="drift of a basis at its last move, mean", ylim=(0, None))
    axes.legend() if drawn else None
    return drawn


def _rates(axes: Any, runs: list[Run]) -> bool:
    found = {run["settings"]["backend"].get("subspace_lr"): run["result"]["loss"] for run in runs}
    rates = sorted(rate for rate in found if isinstance(rate, float | int))
    if not rates:
        return False
    axes.semilogx(rates, [found[rate] for rate in rates], "o-", label="fixed")
    if "auto" in found:
        axes.axhline(found["auto"], color="C1", label="auto")
    axes.set(xlabel="subspace_lr", ylabel="validation loss, nats a byte")
    axes.legend()
    return True


def _ranks(axes: Any, runs: list[Run]) -> bool:
    series: dict[str, dict[int, float]] = {}
    for run in runs:
        s = run["settings"]
        plain = s.get("rank_scaling") and not s["backend"] and isinstance(s["rank"], int)
        if plain and s["lr"] == 1e-3 and s["seed"] == 0:
            series.setdefault(s["method"], {})[s["rank"]] = run["result"]["loss"]
    series = {method: points for method, points in series.items() if len(points) > 2}
    for method, points in series.items():
        axes.semilogx(sorted(points), [points[rank] for rank in sorted(points)], "o-", base=2, label=method)
    axes.set(xlabel="rank (d = 256)", ylabel="validation loss, nats a byte")
    axes.legend() if series else None
    return bool(series)


def _memory(axes: Any, runs: list[Run]) -> bool:
    kinds = ("weights", "gradients", "optimizer", "saved_activations")
    left = [0.0] * len(runs)
    labels = [f"{run['settings']['method']} {run['settings']['rank'] or ''}" for run in runs]
    for kind in kinds:
        values = [run["result"]["sizes"][kind] / 2**20 for run in runs]
        axes.barh(labels, values, left=left, label=kind.replace("_", " "))
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set(xlabel="MiB, SmolLM2-135M, 4 x 256 tokens")
    axes.legend()
    return bool(runs)
