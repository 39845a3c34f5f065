"""Which subspace a parameter has: looked up by the parameter object, on every call of a compiled graph."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from oasis_fx.runtime.layout import Features, num_features
from oasis_fx.runtime.subspace import Subspace, SubspaceSpec, initial_basis


@dataclass(frozen=True)
class Preloaded:
    """A basis from a checkpoint; weights with an equal ``group`` share it."""

    basis: torch.Tensor
    num_updates: int
    group: object
    num_steps: int = 0


class SubspaceStore:
    """Subspaces by parameter and specification. A deleted parameter takes its entry with it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._subspaces: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._preloaded: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def existing(self, weight: torch.Tensor, spec: SubspaceSpec) -> Subspace | None:
        """The subspace of a weight, or None before its first use."""
        entry: dict[SubspaceSpec, Subspace] | None = self._subspaces.get(weight)
        return None if entry is None else entry.get(spec)

    def all_of(self, weight: torch.Tensor) -> tuple[Subspace, ...]:
        """The subspaces of a weight, one for each specification that a graph has asked for."""
        entry: dict[SubspaceSpec, Subspace] = self._subspaces.get(weight) or {}
        return tuple(entry.values())

    def ranks(self, weight: torch.Tensor) -> tuple[int, ...]:
        """Ranks of the subspaces that a weight has."""
        return tuple(subspace.spec.rank for subspace in self.all_of(weight))

    def resolve(self, weights: Sequence[torch.Tensor], spec: SubspaceSpec, features: Sequence[Features]) -> Subspace:
        """The subspace that all of ``weights`` share from now on; made at first use.

        Weights of one group may come with different subspaces: a graph compiled for one layer is used for
        another whose weights got theirs from other graphs. They then take the first one's; the optimizer
        carries moments over between any two bases of one rank.
        """
        first = self.existing(weights[0], spec)
        if first is not None and _fits(first, weights[0]):
            if all(self.existing(weight, spec) is first for weight in weights[1:]):
                return first
        with self._lock:
            known = [s for w in weights if (s := self.existing(w, spec)) is not None]
            subspace = known[0] if known else self._make(weights, spec, features)
            if not _fits(subspace, weights[0]):  # the model was moved or cast since
                basis = subspace.basis.detach().to(weights[0].device, _basis_dtype(weights[0]))
                subspace = Subspace(basis, spec, int(subspace.num_updates), int(subspace.num_steps))
            for weight in weights:
                self._subspaces.setdefault(weight, {})[spec] = subspace
            return subspace

    def preload(
        self, weight: torch.Tensor, basis: torch.Tensor, num_updates: int, group: object, num_steps: int = 0
    ) -> None:
        """Give a weight a basis [n, r] from a checkpoint.

        Its subspaces of that rank take it over in place; without one, it waits for the first graph that asks.
        """
        with self._lock:
            live = [subspace for subspace in self.all_of(weight) if subspace.spec.rank == basis.shape[1]]
            for subspace in live:
                subspace.load(basis, num_updates, num_steps)
            if not live:
                self._preloaded[weight] = Preloaded(basis.detach().clone(), num_updates, group, num_steps)

    def _make(self, weights: Sequence[torch.Tensor], spec: SubspaceSpec, features: Sequence[Features]) -> Subspace:
        weight = weights[0]
        n = num_features(weight.shape, features[0])
        waiting: list[Preloaded] = [p for w in weights if (p := self._preloaded.get(w)) is not None]
        for saved in waiting:
            if saved.basis.shape != (n, spec.rank):
                continue
            basis = saved.basis.to(device=weight.device, dtype=_basis_dtype(weight), copy=True)
            subspace = Subspace(basis, spec, saved.num_updates, saved.num_steps)
            for other in [w for w, p in self._preloaded.items() if p.group == saved.group]:
                self._preloaded.pop(other)
                self._subspaces.setdefault(other, {})[spec] = subspace
            return subspace
        return Subspace(initial_basis(n, spec.rank, _basis_dtype(weight), weight.device), spec)


def _basis_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _fits(subspace: Subspace, weight: torch.Tensor) -> bool:
    return subspace.basis.device == weight.device and subspace.basis.dtype == _basis_dtype(weight)


STORE = SubspaceStore()
