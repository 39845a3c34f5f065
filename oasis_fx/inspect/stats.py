"""How the subspaces of a model do during training: a table, and a flat dict for loggers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate

from oasis_fx.compile.names import without_wrappers
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace


@dataclass(frozen=True)
class SubspaceStats:
    """One subspace, at the last `optimizer.step()` that moved it; NaN before the first.

    Attributes:
        name: of the first of its weights; a number is added where several subspaces have weights of one name.
        weights: names of the weights that share it.
        shape: (n, rank) of its basis.
        captured_energy: ``||X Q||^2 / ||X||^2`` of the step's activations, 0 to 1, in the basis that the step used.
            NaN with ``oasis_backend(stats=False)``.
        drift: distance of the basis from the one before, ``sqrt(1 - ||Q^T Q+||^2 / rank)``: 0 where it spans the
            same space, 1 where the spaces are orthogonal.
        condition: of the Cholesky factor that orthonormalised the basis: its largest diagonal entry over its
            smallest.
        num_updates: how often the basis has moved.
        missed: optimizer steps at which it was due to move and did not: no gradient came from the compiled model, or
            its statistic was zero or not finite, or could not be orthonormalised.
    """

    name: str
    weights: tuple[str, ...]
    shape: tuple[int, int]
    captured_energy: float
    drift: float
    condition: float
    num_updates: int
    missed: int = 0


QUANTITIES = ("captured_energy", "drift", "condition")


class Stats(tuple[SubspaceStats, ...]):
    """The subspaces of a model; `str()` is a table."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = [
            (
                s.name,
                ", ".join(map(_last_module, s.weights)),
                *s.shape,
                *(getattr(s, q) for q in QUANTITIES),
                s.num_updates,
                s.missed,
            )
            for s in self
        ]
        headers = ["subspace", "shared by", "n", "rank", "captured\nenergy", "drift", "condition", "updates"]
        return tabulate(lines, headers=[*headers, "missed"], floatfmt=("", "", "", "", ".3f", ".3f", ".3g", "", ""))

    def flat(self, prefix: str = "oasis") -> dict[str, float]:
        """``{"oasis/layers.0.q_proj.weight/drift": 0.02, ..., "oasis/mean/drift": 0.03}``, for TensorBoard or W&B.

        Values that are unknown (NaN) are left out.
        """
        found = {f"{prefix}/{s.name}/{q}": getattr(s, q) for s in self for q in QUANTITIES}
        found = {key: value for key, value in found.items() if not math.isnan(value)}
        for quantity in QUANTITIES:
            known = [v for s in self if math.isfinite(v := getattr(s, quantity))]
            if known:
                found[f"{prefix}/mean/{quantity}"] = sum(known) / len(known)
        return found


def collect_stats(subspaces: Mapping[Subspace, tuple[str, ...]], model: torch.nn.Module | None) -> Stats:
    """Read the scalars of all subspaces, at once for each device."""
    live = dict(subspaces)
    names = live if model is None else _names_in(model, live)
    kept = [subspace for subspace in live if subspace in names]
    values: dict[Subspace, list[float]] = {}
    for device in dict.fromkeys(subspace.device for subspace in kept):
        here = [subspace for subspace in kept if subspace.device == device]
        scalars = [
            [s.measure(q).double() for q in QUANTITIES] + [c.double() for c in (s.num_updates, s.num_stuck)]
            for s in here
        ]
        read = torch.stack([scalar for row in scalars for scalar in row]).view(len(here), -1).tolist()
        values.update(zip(here, read, strict=True))
    rows, seen = [], dict[str, int]()
    for subspace in kept:
        first = names[subspace][0]
        seen[first] = seen.get(first, 0) + 1
        name = first if seen[first] == 1 else f"{first} ({seen[first]})"
        captured, drift, condition, updates, stuck = values[subspace]
        n, rank = subspace.shape
        found = captured, drift, condition, int(updates), subspace.num_missed + int(stuck)
        rows.append(SubspaceStats(name, names[subspace], (n, rank), *found))
    return Stats(rows)


def _names_in(model: torch.nn.Module, subspaces: Mapping[Subspace, Sequence[str]]) -> dict[Subspace, tuple[str, ...]]:
    found: dict[Subspace, list[str]] = {}
    for name, weight in model.named_parameters():
        for subspace in STORE.all_of(weight):
            if subspace in subspaces:
                found.setdefault(subspace, []).append(without_wrappers(name))
    return {subspace: tuple(members) for subspace, members in found.items()}


def _last_module(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else parts[-1]
