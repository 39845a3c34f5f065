"""From scratch: each method at the best learning rate of a grid, then more seeds there, then the best ones longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.experiments.methods import METHODS
from benchmarks.experiments.runs import Settings, with_interval
from benchmarks.experiments.training import settings

Result = Callable[[Settings], dict[str, Any] | None]


def plan(known: Result, names: list[str], seeds: int, rates: list[float] | None, **fixed: Any) -> Iterator[Settings]:
    """The runs that are to be done, in order; what comes after a grid depends on its results."""
    for name in names:
        yield from (settings(name, lr, 0, **fixed) for lr in rates or METHODS[name].rates)
    for name in names:
        lr = best_rate(known, name, rates, **fixed)
        if lr is not None:
            yield from (settings(name, lr, seed, **fixed) for seed in range(1, seeds))


def best_rate(known: Result, name: str, rates: list[float] | None, **fixed: Any) -> float | None:
    """The learning rate with the least loss of those done with the first seed; None for none."""
    losses = {}
    for lr in rates or METHODS[name].rates:
        result = known(settings(name, lr, 0, **fixed))
        if result is not None:
            losses[lr] = result["loss"]
    return min(losses, key=losses.__getitem__) if losses else None


def longer(known: Result, names: list[str], rates: list[float] | None, times: int, **fixed: Any) -> Iterator[Settings]:
    """The three best of a grid, and adamw, for ``times`` as many steps at their learning rates."""
    losses = {}
    for name in names:
        lr = best_rate(known, name, rates, **fixed)
        result = None if lr is None else known(settings(name, lr, 0, **fixed))
        if result is not None:
            losses[name] = result["loss"]
    chosen = sorted((n for n in losses if n != "adamw"), key=losses.__getitem__)[:3]
    for name in [n for n in ("adamw",) if n in losses] + chosen:
        lr = best_rate(known, name, rates, **fixed)
        assert lr is not None
        yield settings(name, lr, 0, **{**fixed, "steps": fixed["steps"] * times})


def table(
    known: Result, names: list[str], seeds: int, rates: list[float] | None, against: str, **fixed: Any
) -> list[list[Any]]:
    """Rows as `headers` has them. A seed fixes initial weights and batches, so methods are compared seed by seed."""
    rows = []
    base = _at_best(known, against, seeds, rates, **fixed)
    for name in names:
        lr = best_rate(known, name, rates, **fixed)
        if lr is None:
            rows.append([name, "not run"])
            continue
        runs = _at_best(known, name, seeds, rates, **fixed)
        done = list(runs.values())
        behind = [run["loss"] - base[seed]["loss"] for seed, run in runs.items() if seed in base and name != against]
        grid = {rate: known(settings(name, rate, 0, **fixed)) for rate in rates or METHODS[name].rates}
        losses = ", ".join(f"{rate:g}: {r['loss']:.3f}" for rate, r in grid.items() if r is not None)
        sizes = done[0]["sizes"]
        kept = (sizes["gradients"] + sizes["optimizer"]) / 2**20 if sizes else None
        loss = with_interval([run["loss"] for run in done])
        rows.append([name, losses, f"{lr:g}", loss, with_interval(behind), len(done), kept])
    return rows


def _at_best(
    known: Result, name: str, seeds: int, rates: list[float] | None, **fixed: Any
) -> dict[int, dict[str, Any]]:
    """By seed, the runs at the best rate."""
    lr = best_rate(known, name, rates, **fixed)
    runs = {} if lr is None else {seed: known(settings(name, lr, seed, **fixed)) for seed in range(seeds)}
    return {seed: run for seed, run in runs.items() if run is not None}


def headers(against: str) -> list[str]:
    return ["method", "loss by learning rate", "best", "loss", f"loss - {against}'s", "seeds", "grad+opt MiB"]
