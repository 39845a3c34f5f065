"""The inputs that a compiled graph takes from the runtime, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# In the order in which a graph takes them: for each group of weights a basis Q [n, r], a tail T [n, t], a scalar for
# the energy ||A||^2 and what operators within the graph are told (int64[3]); then for each weight a coordinate slot
# S [m, r + t].
RUNTIME_INPUTS = ("basis", "tail", "energy", "control", "slot")


@dataclass(frozen=True)
class RuntimeInputs:
    """Where the runtime's inputs of a graph stand among all of its inputs.

    Attributes:
        first: position of the first of them, which is the number of the graph's own inputs.
        num_groups: groups of weights that share a basis.
        num_weights: weights in all groups.
        has_energy: whether each group has a scalar for its energy.
        has_control: whether each group tells the operators within the graph something.
        has_tail: whether each group has a tail, which may have no columns.
    """

    first: int
    num_groups: int
    num_weights: int
    has_energy: bool
    has_control: bool
    has_tail: bool = False

    def positions(self, kind: str) -> range:
        """Return the positions of all inputs of one kind of `RUNTIME_INPUTS`: one a group; of slots one a weight."""
        earlier = RUNTIME_INPUTS[: RUNTIME_INPUTS.index(kind)]
        start = self.first + sum(map(self._count, earlier))
        return range(start, start + self._count(kind))

    def position(self, kind: str, index: int) -> int | None:
        """Return the position of one input; None where the graph takes none of that kind."""
        positions = self.positions(kind)
        return positions[index] if positions else None

    def names(self) -> dict[int, str]:
        """Return a name for each input, such as ``basis_0``, by position and in order."""
        return {at: f"{kind}_{index}" for kind in RUNTIME_INPUTS for index, at in enumerate(self.positions(kind))}

    def kinds(self) -> dict[int, str]:
        """Return the kind of each input, by position and in order."""
        return {at: kind for kind in RUNTIME_INPUTS for at in self.positions(kind)}

    def in_order(
        self,
        *,
        basis: Sequence[T],
        slot: Sequence[T],
        tail: Sequence[T] = (),
        energy: Sequence[T] = (),
        control: Sequence[T] = (),
    ) -> tuple[T, ...]:
        """Return the values of all inputs in order. Those of kinds that the graph does not take are left out."""
        given = {"basis": basis, "tail": tail, "energy": energy, "control": control, "slot": slot}
        return tuple(value for kind in RUNTIME_INPUTS if self._takes(kind) for value in given[kind])

    def _takes(self, kind: str) -> bool:
        return {"tail": self.has_tail, "energy": self.has_energy, "control": self.has_control}.get(kind, True)

    def _count(self, kind: str) -> int:
        wanted = self._takes(kind)
        return wanted * (self.num_weights if kind == "slot" else self.num_groups)
