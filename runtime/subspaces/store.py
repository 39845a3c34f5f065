"""Which subspace a parameter has: looked up by the parameter object, on every call of a compiled graph."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from oasis_fx.graph.matricization import Features, num_features
from oasis_fx.runtime.subspaces.by_tensor import ByTensor
from oasis_fx.runtime.subspaces.subspace import Momentum, Subspace, SubspaceSpec, initial_basis


@dataclass(frozen=True, eq=False)
class Preloaded:
    """A subspace from a checkpoint; weights with an equal ``group`` share it.

    Attributes:
        basis: [n, r], or the code of a coded rule.
        shape: (n, r).
        features: which dimensions of the weight are n.
        coded: whether ``basis`` is a code.
        momentum, error, log_rate, last_move: as of `Subspace`.
        overrides: whether its rank counts, and not what the settings ask for.
        resizable: whether its rule lets the rank change.
    """

    basis: torch.Tensor
    shape: tuple[int, int]
    group: object
    features: Features
    num_updates: int
    num_steps: int = 0
    seed: int = 0
    coded: bool = False
    momentum: Momentum | None = None
    error: torch.Tensor | None = None
    log_rate: torch.Tensor | None = None
    last_move: torch.Tensor | None = None
    overrides: bool = False
    resizable: bool = True

    def suits(self, shape: tuple[int, int], spec: SubspaceSpec) -> bool:
        """Whether it can become a subspace of that shape.

        Raises:
            ValueError: the rule cannot go on with it.
        """
        if self.shape != shape:
            return False
        rule = spec.rule
        if self.coded != rule.coded or (rule.coded and self.basis.shape != rule.first_code(spec.rank, 0).shape):
            raise ValueError(f"the checkpoint has a basis of another rule than the backend's, {rule.name!r}")
        return True

    def pour_into(self, subspace: Subspace) -> None:
        subspace.load(self.basis, self.num_updates, self.num_steps)
        subspace.seed, subspace.momentum, subspace.error = self.seed, self.momentum, self.error
        subspace.last_move = self.last_move
        if self.log_rate is not None:
            subspace.log_rate = self.log_rate


_Key = tuple[SubspaceSpec, Features]


class SubspaceStore:
    """Subspaces by parameter, specification, and the dimensions of the parameter that are summed over.

    A weight that one graph reads over its rows and another over its columns has two subspaces: factors of the two are
    never added. A deleted parameter takes its entry with it. Methods take a shard for its whole parameter.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._subspaces = ByTensor()
        self._preloaded = ByTensor()
        self._resized = ByTensor()
        self._wholes = ByTensor()

    def note_shard(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        """From now on take a DTensor, which an optimizer steps, for the gathered parameter that compiled graphs see."""
        self._wholes[shard] = whole

    def forget_shard(self, shard: torch.Tensor) -> None:
        """Take back `note_shard`."""
        self._wholes.pop(shard, None)

    def whole(self, weight: torch.Tensor) -> torch.Tensor:
        """The parameter that compiled graphs see: the gathered one of a shard, or the weight itself."""
        return self._wholes.get(weight, weight) if self._wholes else weight  # type: ignore[no-any-return]

    def existing(self, weight: torch.Tensor, spec: SubspaceSpec, features: Features | None = None) -> Subspace | None:
        """The subspace of a weight that is read over ``features`` (None: over any), or None before its first use."""
        if features is not None:
            return self._entry(weight).get((spec, features))
        return next((subspace for (present, _), subspace in self._entry(weight).items() if present == spec), None)

    def _entry(self, weight: torch.Tensor) -> dict[_Key, Subspace]:
        return self._subspaces.get(self.whole(weight)) or {}

    def waiting(self, weight: torch.Tensor) -> Preloaded | None:
        """A basis from a checkpoint that no graph has asked for yet."""
        saved: Preloaded | None = self._preloaded.get(self.whole(weight))
        return saved

    def current_spec(self, weight: torch.Tensor, asked: SubspaceSpec) -> SubspaceSpec:
        """What the weight is in by now, where the settings ask for ``asked``: its rank may have changed since."""
        with self._lock:
            entry: dict[SubspaceSpec, SubspaceSpec] = self._resized.setdefault(weight, {})
            saved: Preloaded | None = self._preloaded.get(weight)
            if saved is not None and (asked.budget is not None or saved.overrides):
                entry[asked] = replace(asked, rank=saved.shape[1])
            return entry.get(asked, asked)

    def is_resized(self, weight: torch.Tensor) -> bool:
        """Whether its rank is another than settings asked for, since `resize_rank` or a budget changed it."""
        saved, entry = self.waiting(weight), self._resized.get(self.whole(weight)) or {}
        overridden = saved is not None and saved.overrides
        return overridden or any(asked.rank != present.rank for asked, present in entry.items())

    def exchange(self, old: Subspace, new: Subspace) -> None:
        """Put ``new``, of another rank, in the place of ``old`` for all its weights."""
        with self._lock:
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
        """Take a weight out of its subspaces, which others may go on sharing."""
        with self._lock:
            self._subspaces.pop(self.whole(weight), None)

    def all_of(self, weight: torch.Tensor) -> tuple[Subspace, ...]:
        """The subspaces of a weight, one for each specification that a graph has asked for."""
        return tuple(self._entry(weight).values())

    def read_over(self, weight: torch.Tensor) -> tuple[Features, ...]:
        """The dimensions that graphs have summed over so far, each once."""
        return tuple(dict.fromkeys(features for _, features in self._entry(weight)))

    def in_use(self, weight: torch.Tensor, *, dense: bool = False) -> tuple[Subspace, Features] | None:
        """The subspace in which an optimizer keeps the states of a weight, whatever kind its gradient is of.

        Of several it is the first that has a statistic, else the newest. None where the weight has none.

        Args:
            dense: look instead for one whose rule lets gradients leave the graph dense, and so wants states at full
                size, but has a basis that is kept from step to step.
        """
        weight = self.whole(weight)
        found = [
            (subspace, features)
            for (spec, features), subspace in self._entry(weight).items()
            if spec.rule.dense == dense and not getattr(spec.rule, "each_batch", False) and _fits(subspace, weight)
        ]
        return next((entry for entry in found if entry[0].statistic is not None), found[-1] if found else None)

    def ranks(self, weight: torch.Tensor) -> tuple[int, ...]:
        """Ranks of the subspaces that a weight has."""
        return tuple(subspace.spec.rank for subspace in self.all_of(weight))

    def resolve(self, weights: Sequence[torch.Tensor], spec: SubspaceSpec, features: Sequence[Features]) -> Subspace:
        """The subspace that all of ``weights`` share from now on; made at first use.

        Weights of one group may come with different subspaces: a graph compiled for one layer is used for
        another whose weights got theirs from other graphs. They then take the first one's; the optimizer
        carries moments over between any two bases of one rank.

        Raises:
            ValueError: a checkpoint has given them a basis that the rule cannot go on with.
        """
        pairs = list(zip(weights, features, strict=True))
        first = self.existing(weights[0], spec, features[0])
        if first is not None and _fits(first, weights[0]):
            if all(self.existing(weight, spec, dims) is first for weight, dims in pairs[1:]):
                return first
        with self._lock:
            known = [s for weight, dims in pairs if (s := self.existing(weight, spec, dims)) is not None]
            subspace = known[0] if known else self._make(weights, spec, features)
            if not _fits(subspace, weights[0]):
                subspace = _moved(subspace, weights[0])
            for weight, dims in pairs:
                self._subspaces.setdefault(weight, {})[spec, dims] = subspace
            return subspace

    def preload(self, weight: torch.Tensor, saved: Preloaded) -> bool:
        """Give a weight a basis from a checkpoint.

        Its subspaces of that rank take it over in place; without one, it waits for the first graph that asks.

        Returns:
            Whether graphs are to be compiled anew: the rank is one that is shared out, and was another here.
        """
        weight = self.whole(weight)
        with self._lock:
            rank, entry = saved.shape[1], self._entry(weight)
            outgrown = [key for key in entry if key[0].budget is not None and key[0].rank != rank]
            for key in outgrown:
                del entry[key]
            of_rank = [s for (_, dims), s in entry.items() if s.spec.rank == rank and dims == saved.features]
            live = [s for s in of_rank if saved.suits(s.shape, s.spec)]
            for subspace in live:
                saved.pour_into(subspace)
            if not live:
                self._preloaded[weight] = replace(saved, basis=saved.basis.detach().clone())
            return bool(outgrown)

    def _make(self, weights: Sequence[torch.Tensor], spec: SubspaceSpec, features: Sequence[Features]) -> Subspace:
        weight = weights[0]
        shape = num_features(weight.shape, features[0]), spec.rank
        # From torch's generator, as parameters draw their first values.
        seed = int(torch.randint(1 << 31, (), device="cpu")) if spec.rule.draws else 0
        subspace = Subspace(initial_basis(*shape, _basis_dtype(weight), weight.device), spec, seed=seed)
        pairs = zip(weights, features, strict=True)
        waiting: list[Preloaded] = [
            p for w, dims in pairs if (p := self._preloaded.get(w)) is not None and p.features == dims
        ]
        for saved in waiting:
            if not saved.suits(shape, spec):
                continue
            saved.pour_into(subspace)
            for other, preloaded in [(w, p) for w, p in self._preloaded.items() if p.group == saved.group]:
                self._preloaded.pop(other)
                self._subspaces.setdefault(other, {})[spec, preloaded.features] = subspace
            break
        return subspace


# What a subspace has of floating point numbers, beside its basis; each may be None.
_TENSORS = (
    "statistic",
    "energy_sum",
    "overlap",
    "error",
    "log_rate",
    "last_move",
    "captured_energy",
    "drift",
    "condition",
)


def _moved(subspace: Subspace, weight: torch.Tensor) -> Subspace:
    """The subspace for a model that was moved or cast since."""
    device, dtype = weight.device, _basis_dtype(weight)
    moved = Subspace(
        subspace.basis.detach().to(device, dtype),
        subspace.spec,
        int(subspace.num_updates),
        int(subspace.num_steps),
        seed=subspace.seed,
        code=subspace.code,
    )
    moved.names, moved.replicas, moved.family = subspace.names, subspace.replicas, subspace.family
    moved.statistic_is_local = subspace.statistic_is_local
    moved.num_idle_steps, moved.num_missed = subspace.num_idle_steps, subspace.num_missed
    for name in _TENSORS:
        value = getattr(subspace, name)
        setattr(moved, name, None if value is None else value.to(device, dtype, copy=True))
    momentum = subspace.momentum
    if momentum is not None:  # the optimizer lends its own again at its next step
        mean, step = momentum.mean.to(device, dtype), momentum.step.to(device)
        moved.momentum = replace(momentum, mean=mean, step=step)
    return moved


def _basis_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _fits(subspace: Subspace, weight: torch.Tensor) -> bool:
    return subspace.device == weight.device and subspace.dtype == _basis_dtype(weight)


STORE = SubspaceStore()
