"""The state of a subspace, and everything that happens to it as a whole.

Each field says once what becomes of it when the model is moved or cast (`SubspaceState.to`), in a checkpoint
(`Subspace.entries`, `SubspaceState.from_entries`, `Subspace.load`), and when the rank changes
(`SubspaceState.resized`). All of these go over the fields, so that none of them can forget one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from oasis_fx.runtime.subspaces.momentum import Momentum

Kind = Literal["tensor", "scalar", "count", "number"]
MEASURES = ("captured_energy", "drift", "condition")


class Family:
    """Subspaces that one compiled graph serves in turn, as those of equal layers, and that so have one rank."""

    def __init__(self) -> None:
        self._parent: Family | None = None

    def root(self) -> Family:
        """Return the object that stands for all families that were joined with this one."""
        found = self
        while found._parent is not None:
            found = found._parent
        return found

    def join(self, other: Family) -> None:
        """Make one family of this one and another."""
        one, another = self.root(), other.root()
        if one is not another:
            another._parent = one


def basis_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a basis, and of optimizer states in its coordinates: float64 for float64 weights, or float32.

    Args:
        weight_dtype: dtype of the weights in the subspace.
    """
    return torch.float64 if weight_dtype == torch.float64 else torch.float32


# Fields of this process alone. Some mean nothing under another rank, where they begin anew.
_LASTING = {"of_rank": False, "on_cpu": False}
_OF_RANK = {"of_rank": True, "on_cpu": False}


def _saved(key: str, kind: Kind, *, of_rank: bool = False, on_cpu: bool = False) -> dict[str, Any]:
    """Return the metadata of a field that optimizer state dicts have under ``key``.

    Args:
        key: begins with "basis".
        kind: ``"tensor"``; ``"scalar"``, a tensor without dimensions; ``"count"``, one of int64; ``"number"``, an int.
        of_rank: whether it means nothing under another rank, where it begins anew.
        on_cpu: whether it stays on the CPU, whatever the device of the basis.
    """
    return {"key": key, "kind": kind, "of_rank": of_rank, "on_cpu": on_cpu}


@dataclass(eq=False)
class SubspaceState:
    """All that training changes in a subspace.

    Attributes:
        shape: (n, r) of the basis.
        dtype, device: of the basis: `basis_dtype`.
        num_updates: int64 scalar on the device of the basis: how often the basis has moved.
        steps_since_due: int64 scalar on the CPU: optimizer steps since the basis was last due to move.
        stored_basis: Q [n, r], contiguous, changed in place only, so that CUDA graphs may keep its address; None where
            the rule is coded.
        code: what a coded rule makes the basis from at each use: int64 on the CPU; else None.
        seed: tells subspaces of one shape apart where a rule draws at random.
        tail: T [n, t], the columns that are drawn anew at each step, changed in place only; None where there are none.
        num_tails: int64 scalar on the CPU: how often a tail has been drawn.
        error: E [rows, n] of rules with error feedback.
        last_move: sketch of the last move, which ``lr="auto"`` compares the next one with.
        log_rate: scalar, the logarithm of the step size that ``lr="auto"`` has found; 0 at first.
        momentum: first moment of the weight, for rules that use it; lent by the optimizer, which saves it itself.
        statistic: C [n, r] = A^T A Q, summed over the backward passes of this step; None before the first.
        energy_sum: scalar ||A||^2, summed likewise; None where graphs do not compute it.
        statistic_is_local: whether something in the statistic has yet to be averaged over ranks.
        has_pending_move: whether the basis has moved within a backward or forward pass since the last optimizer step.
        overlap: R = Q^T Q+ [r, r] of these moves; None for I.
        measures: [3], the `MEASURES` of the last move, NaN before: `oasis_fx.inspect.stats.SubspaceStats`.
        num_idle_steps: optimizer steps in a row in which the weights took part and the basis could not move.
        num_missed: steps, in a row or not, in which there was nothing to move the basis by.
        num_stuck: int64 scalar on the device of the basis: how often there was a statistic and the basis could not move
            by it.
        names: of the weights, as the first graph that used them knows them; empty before.
        replicas: ranks over which gradients and statistics are averaged, so that all have the same basis; empty where
            none are.
        family: the subspaces whose rank is also that of this one.
    """

    shape: tuple[int, int] = field(metadata=_OF_RANK)
    dtype: torch.dtype = field(metadata=_LASTING)
    device: torch.device = field(metadata=_LASTING)
    # In checkpoints, in the order in which their entries stand there.
    num_updates: torch.Tensor = field(default=None, metadata=_saved("basis_updates", "count"))  # type: ignore[assignment]
    steps_since_due: torch.Tensor = field(default=None, metadata=_saved("basis_steps", "count", on_cpu=True))  # type: ignore[assignment]
    stored_basis: torch.Tensor | None = field(default=None, metadata=_saved("basis", "tensor", of_rank=True))
    code: torch.Tensor | None = field(default=None, metadata=_saved("basis_code", "tensor", of_rank=True, on_cpu=True))
    seed: int = field(default=0, metadata=_saved("basis_seed", "number"))
    tail: torch.Tensor | None = field(default=None, metadata=_saved("basis_tail", "tensor", of_rank=True))
    num_tails: torch.Tensor = field(default=None, metadata=_saved("basis_tails", "count", on_cpu=True))  # type: ignore[assignment]
    error: torch.Tensor | None = field(default=None, metadata=_saved("basis_error", "tensor"))
    last_move: torch.Tensor | None = field(default=None, metadata=_saved("basis_move", "tensor", of_rank=True))
    log_rate: torch.Tensor = field(default=None, metadata=_saved("basis_log_rate", "scalar"))  # type: ignore[assignment]
    # Of this process alone.
    momentum: Momentum | None = field(default=None, metadata=_OF_RANK)
    statistic: torch.Tensor | None = field(default=None, metadata=_OF_RANK)
    energy_sum: torch.Tensor | None = field(default=None, metadata=_OF_RANK)
    statistic_is_local: bool = field(default=False, metadata=_OF_RANK)
    has_pending_move: bool = field(default=False, metadata=_OF_RANK)
    overlap: torch.Tensor | None = field(default=None, metadata=_OF_RANK)
    measures: torch.Tensor = field(default=None, metadata=_OF_RANK)  # type: ignore[assignment]
    num_idle_steps: int = field(default=0, metadata=_LASTING)
    num_missed: int = field(default=0, metadata=_LASTING)
    num_stuck: torch.Tensor = field(default=None, metadata=_LASTING)  # type: ignore[assignment]
    names: tuple[str, ...] = field(default=(), metadata=_LASTING)
    replicas: frozenset[int] = field(default=frozenset(), metadata=_LASTING)
    family: Family = field(default=None, metadata=_OF_RANK)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        scalar = torch.zeros((), dtype=self.dtype, device=self.device)
        firsts = {
            "num_updates": torch.zeros((), dtype=torch.int64, device=self.device),
            "steps_since_due": torch.zeros((), dtype=torch.int64, device="cpu"),
            "num_tails": torch.zeros((), dtype=torch.int64, device="cpu"),
            "num_stuck": torch.zeros((), dtype=torch.int64, device=self.device),
            "log_rate": scalar,
            "measures": scalar.new_full((len(MEASURES),), torch.nan),
            "family": Family(),
        }
        for name, first in firsts.items():
            if getattr(self, name) is None:
                setattr(self, name, first)

    def measure(self, name: str) -> torch.Tensor:
        """Return one of the `MEASURES`, a scalar."""
        return self.measures[MEASURES.index(name)]

    def note_measure(self, name: str, value: torch.Tensor) -> None:
        """Note one of the `MEASURES` of a move; what was read before stays as it is."""
        self.measures = self.measures.clone()
        self.measures[MEASURES.index(name)] = value

    def to(self, device: torch.device, dtype: torch.dtype) -> SubspaceState:
        """Return a copy of the state on a device and in a dtype, as for a model that was moved or cast."""
        moved = {f.name: _moved(getattr(self, f.name), _place(f.metadata, device), dtype) for f in _FIELDS}
        return SubspaceState(**moved | {"device": device, "dtype": dtype})

    def resized(self, basis: torch.Tensor) -> SubspaceState:
        """Return the state under a new basis of another rank; it takes over all that does not depend on the rank.

        Args:
            basis: Q [n, another r], taken over without a copy.
        """
        kept = {f.name: getattr(self, f.name) for f in _FIELDS if not f.metadata["of_rank"]}
        counts = {f.name: kept[f.name].clone() for f in SAVED_FIELDS if f.metadata["kind"] == "count"}
        return SubspaceState(**kept | counts, shape=(basis.shape[0], basis.shape[1]), stored_basis=basis)

    @staticmethod
    def from_entries(
        entries: Mapping[str, Any], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> SubspaceState:
        """Return the state of a subspace from the entries in an optimizer's state; tensors are copied.

        Args:
            entries: with what `Subspace.entries` gave, of any age: what is missing is as in a new subspace.
            shape: (n, r) of the basis.
            dtype, device: of the state, whatever those of the entries.
        """
        found: dict[str, Any] = {}
        for f in SAVED_FIELDS:
            value, place = entries.get(f.metadata["key"]), _place(f.metadata, device)
            if value is None:
                continue
            if f.metadata["kind"] == "number":
                found[f.name] = int(value)
            elif f.metadata["kind"] == "count":
                found[f.name] = torch.tensor(int(value), device=place)
            else:
                found[f.name] = _moved(value, place, dtype)
        return SubspaceState(shape, dtype, device, **found)


_FIELDS = fields(SubspaceState)
SAVED_FIELDS = tuple(f for f in _FIELDS if "key" in f.metadata)
SAVED_KEYS: dict[str, str] = {f.name: f.metadata["key"] for f in SAVED_FIELDS}


def _place(metadata: Mapping[str, Any], device: torch.device) -> torch.device:
    return torch.device("cpu") if metadata["on_cpu"] else device


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a copy of a tensor, cast where it is of floating point; anything that holds no tensors as it is."""
    if isinstance(value, Momentum):
        return value.to(device, dtype)
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
