"""Find the subspace of a parameter by the parameter object, on every call of a compiled graph."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch

from oasis_fx.graph.matricization import Features, num_features
from oasis_fx.runtime.subspaces.by_tensor import ByTensor
from oasis_fx.runtime.subspaces.initial import initial_basis, new_subspace
from oasis_fx.runtime.subspaces.saved import SavedSubspace
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.state import basis_dtype
from oasis_fx.runtime.subspaces.subspace import Subspace

_Key = tuple[SubspaceSpec, Features]


class SubspaceStore:
    """The subspaces of all parameters, by specification and by the dimensions of the parameter that are summed over.

    A weight that one graph reads over its rows and another over its columns has two subspaces: factors of the two are
    never added. A deleted parameter takes its entry with it. Methods take a shard for its whole parameter.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._subspaces = ByTensor()
        self._waiting = ByTensor()
        self._resized = ByTensor()
        self._wholes = ByTensor()
        self._writes = 0

    @property
    def state_of_entries(self) -> tuple[int, int, int]:
        """Return numbers that are equal at two moments only if the subspaces of all weights were the same at both.

        Writes are counted, and entries, as one goes with its weight.
        """
        return self._writes, len(self._subspaces), len(self._wholes)

    def note_shard(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        """Take a DTensor, which an optimizer steps, for the gathered parameter that graphs see, from now on."""
        self._wholes[shard] = whole
        self._writes += 1

    def forget_shard(self, shard: torch.Tensor) -> None:
        """Take a shard for a parameter of its own again, as before `note_shard`."""
        self._wholes.pop(shard, None)
        self._writes += 1

    def whole(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the parameter that compiled graphs see: the gathered one of a shard, or the weight itself."""
        return self._wholes.get(weight, weight) if self._wholes else weight  # type: ignore[no-any-return]

    def existing(self, weight: torch.Tensor, spec: SubspaceSpec, features: Features | None = None) -> Subspace | None:
        """Return the subspace of a weight under a specification, or None before a graph has used one.

        Args:
            features: the dimensions that the weight is read over; None for any.
        """
        if features is not None:
            return self._entry(weight).get((spec, features))
        return next((subspace for (present, _), subspace in self._entry(weight).items() if present == spec), None)

    def _entry(self, weight: torch.Tensor) -> dict[_Key, Subspace]:
        return self._subspaces.get(self.whole(weight)) or {}

    def waiting(self, weight: torch.Tensor) -> SavedSubspace | None:
        """Return the subspace from a checkpoint that no graph has asked for yet, or None."""
        saved: SavedSubspace | None = self._waiting.get(self.whole(weight))
        return saved

    def current_spec(self, weight: torch.Tensor, asked: SubspaceSpec) -> SubspaceSpec:
        """Return the specification that now stands for ``asked``, whose rank may have changed during training."""
        with self._lock:
            entry: dict[SubspaceSpec, SubspaceSpec] = self._resized.setdefault(weight, {})
            saved: SavedSubspace | None = self._waiting.get(weight)
            if saved is not None and (asked.budget is not None or saved.overrides):
                n, rank = saved.state.shape
                entry[asked] = asked.with_rank(rank, n)
            return entry.get(asked, asked)

    def is_resized(self, weight: torch.Tensor) -> bool:
        """Return whether the rank of a weight is not the one asked for, since `resize_rank` or a budget changed it."""
        saved, entry = self.waiting(weight), self._resized.get(self.whole(weight)) or {}
        overridden = saved is not None and saved.overrides
        return overridden or any(asked.rank != present.rank for asked, present in entry.items())

    def exchange(self, old: Subspace, new: Subspace) -> None:
        """Put a subspace of another rank in the place of ``old``, for all weights that are in it."""
        with self._lock:
            self._writes += 1
            for weight, entry in self._subspaces.items():
                known = [features for (spec, features), subspace in entry.items() if subspace is old]
                if not known:
                    continue
                for features in known:
                    del entry[old.spec, features]
                    entry[new.spec, features] = new
                resized = self._resized.setdefault(weight, {})
                asked = [key for key, present in resized.items() if present == old.spec] or [old.spec]
                resized.update(dict.fromkeys(asked, new.spec))

    def forget(self, weight: torch.Tensor) -> None:
        """Take a weight out of its subspaces, which other weights may go on sharing."""
        with self._lock:
            self._subspaces.pop(self.whole(weight), None)
            self._writes += 1

    def all_of(self, weight: torch.Tensor) -> tuple[Subspace, ...]:
        """Return the subspaces of a weight, one for each specification that a graph has asked for."""
        return tuple(self._entry(weight).values())

    def read_over(self, weight: torch.Tensor) -> tuple[Features, ...]:
        """Return the combinations of dimensions of a weight that graphs have summed over so far, each once."""
        return tuple(dict.fromkeys(features for _, features in self._entry(weight)))

    def in_use(self, weight: torch.Tensor, *, dense: bool = False) -> tuple[Subspace, Features] | None:
        """Return the subspace in which an optimizer keeps the states of a weight, whatever kind its gradient is of.

        Of several it is the first that has a statistic, else the newest. Bases that last for one batch do not count.

        Args:
            dense: look instead for a subspace whose rule lets gradients leave the graph dense, and so wants states at
                full size.

        Returns:
            The subspace, and which dimensions of the weight are n; None where the weight has none.
        """
        weight = self.whole(weight)
        found = [
            (subspace, features)
            for (spec, features), subspace in self._entry(weight).items()
            if spec.rule.dense == dense and not getattr(spec.rule, "each_batch", False) and _fits(subspace, weight)
        ]
        return next((entry for entry in found if entry[0].statistic is not None), found[-1] if found else None)

    def resolve(self, weights: Sequence[torch.Tensor], spec: SubspaceSpec, features: Sequence[Features]) -> Subspace:
        """Return the subspace that all of ``weights`` share from now on; it is made at their first use.

        Weights of one group may come with different subspaces: a graph compiled for one layer is used for
        another whose weights got theirs from other graphs. They then take the first one's; the optimizer
        transports states between any two bases of one rank.

        Args:
            weights: at least one, all of one n, dtype and device.
            spec: what the graph asks for.
            features: of each weight, the dimensions that the graph sums over.

        Raises:
            ValueError: a checkpoint has given them a basis that the rule cannot go on with.
        """
        pairs = list(zip(weights, features, strict=True))
        first = self.existing(weights[0], spec, features[0])
        if first is not None and _fits(first, weights[0]):
            if all(self.existing(weight, spec, dims) is first for weight, dims in pairs[1:]):
                return first
        with self._lock:
            self._writes += 1
            known = [s for weight, dims in pairs if (s := self.existing(weight, spec, dims)) is not None]
            subspace = known[0] if known else self._make(weights, spec, features)
            if not _fits(subspace, weights[0]):
                subspace = Subspace(spec, subspace.to(weights[0].device, basis_dtype(weights[0].dtype)))
            for weight, dims in pairs:
                self._subspaces.setdefault(weight, {})[spec, dims] = subspace
            return subspace

    def load(self, weight: torch.Tensor, saved: SavedSubspace) -> bool:
        """Give a weight a subspace from a checkpoint.

        Subspaces of the weight that have its rank take the state over in place; where there are none, it waits for the
        first graph that asks.

        Returns:
            Whether graphs have to be recompiled: the rank comes from a budget, and was another one here.

        Raises:
            ValueError: a subspace of the weight has a rule that cannot go on with the saved basis.
        """
        weight = self.whole(weight)
        with self._lock:
            self._writes += 1
            rank, entry = saved.state.shape[1], self._entry(weight)
            of_other_rank = [key for key in entry if key[0].budget is not None and key[0].rank != rank]
            for key in of_other_rank:
                del entry[key]
            of_rank = [s for (_, dims), s in entry.items() if s.spec.rank == rank and dims == saved.features]
            live = [s for s in of_rank if saved.suits(s.shape, s.spec)]
            for subspace in live:
                subspace.load(saved.state)
            if not live:
                basis = saved.state.stored_basis
                own = replace(saved.state, stored_basis=None if basis is None else basis.detach().clone())
                self._waiting[weight] = replace(saved, state=own)
            return bool(of_other_rank)

    def _make(self, weights: Sequence[torch.Tensor], spec: SubspaceSpec, features: Sequence[Features]) -> Subspace:
        weight = weights[0]
        shape = num_features(weight.shape, features[0]), spec.rank
        # From torch's generator, as parameters draw their first values.
        seed = int(torch.randint(1 << 31, (), device="cpu")) if spec.rule.draws else 0
        subspace = new_subspace(initial_basis(*shape, basis_dtype(weight.dtype), weight.device), spec, seed)
        pairs = zip(weights, features, strict=True)
        waiting: list[SavedSubspace] = [
            p for w, dims in pairs if (p := self._waiting.get(w)) is not None and p.features == dims
        ]
        for saved in waiting:
            if not saved.suits(shape, spec):
                continue
            subspace.load(saved.state)
            for other, its in [(w, p) for w, p in self._waiting.items() if p.group == saved.group]:
                self._waiting.pop(other)
                self._subspaces.setdefault(other, {})[spec, its.features] = subspace
            break
        return subspace


def _fits(subspace: Subspace, weight: torch.Tensor) -> bool:
    return subspace.device == weight.device and subspace.dtype == basis_dtype(weight.dtype)


STORE = SubspaceStore()
