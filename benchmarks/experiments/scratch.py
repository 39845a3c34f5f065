"""From scratch: each method at the best learning rate of a grid, then more seeds there, then the best ones longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from methods import METHODS
from runs import Settings, mean_and_interval
from training import settings

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


def table(known: Result, names: list[str], seeds: int, rates: list[float] | None, **fixed: Any) -> list[list[Any]]:
    """Rows: method, grid, best rate, loss with its interval, MiB of gradients and optimizer, seconds a step."""
    rows = []
    for name in names:
        lr = best_rate(known, name, rates, **fixed)
        if lr is None:
            rows.append([name, "not run"])
            continue
        runs = [known(settings(name, lr, seed, **fixed)) for seed in range(seeds)]
        done = [run for run in runs if run is not None]
        mean, half = mean_and_interval([run["loss"] for run in done])
        grid = {rate: known(settings(name, rate, 0, **fixed)) for rate in rates or METHODS[name].rates}
        losses = ", ".join(f"{rate:g}: {r['loss']:.3f}" for rate, r in grid.items() if r is not None)
        sizes = done[0]["sizes"]
        kept = (sizes["gradients"] + sizes["optimizer"]) / 2**20 if sizes else None
        loss = f"{mean:.4f}" + (f" ± {half:.4f}" if half == half else "")
        rows.append([name, losses, f"{lr:g}", loss, len(done), kept, done[0]["median_seconds"]])
    return rows


HEADERS = ["method", "loss by learning rate, one seed", "best", "loss", "seeds", "grad+opt MiB", "s/step"]
