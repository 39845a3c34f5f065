"""One setting of a subspace at a time: its step size, its rank, Oja against periodic PCA, the period."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.experiments.runs import Settings, with_interval
from benchmarks.experiments.training import settings

RATES = (0.001, 0.01, 0.1, 1.0, 10.0, "auto")
RANKS = (8, 16, 32, 64, 128)
LEARNING_RATE = 1e-3


def points(**fixed: Any) -> Iterator[tuple[str, Any, str, dict[str, Any]]]:
    """(what is swept, its value, method, other settings)."""
    for rate in RATES:
        yield "subspace_lr", rate, "oja", fixed | {"backend": {"subspace_lr": rate}}
    for method in ("oja", "pca"):
        for rank in RANKS:
            yield f"rank, {method}", rank, method, fixed | {"rank": rank}


def plan(rates: list[float] | None, seeds: int, **fixed: Any) -> Iterator[Settings]:
    lr = (rates or [LEARNING_RATE])[0]
    for seed in range(seeds):
        for _, _, method, others in points(**fixed):
            yield settings(method, lr, seed, **others)


def table(
    known: Callable[[Settings], dict[str, Any] | None], rates: list[float] | None, seeds: int, **fixed: Any
) -> list[list[Any]]:
    lr = (rates or [LEARNING_RATE])[0]
    rows = []
    for what, value, method, others in points(**fixed):
        runs = [known(settings(method, lr, seed, **others)) for seed in range(seeds)]
        losses = [run["loss"] for run in runs if run is not None]
        if losses:
            rows.append([what, str(value), with_interval(losses), len(losses)])
    return rows


HEADERS = ["", "value", "validation loss", "seeds"]
