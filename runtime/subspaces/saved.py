"""The subspace of a checkpoint, until a graph asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from oasis_fx.graph.matricization import Features
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.state import SubspaceState


@dataclass(frozen=True, eq=False)
class SavedSubspace:
    """A subspace from a checkpoint, which waits for the first graph that asks for it.

    Attributes:
        state: what the checkpoint holds of it.
        features: which dimensions of the weight are n.
        group: any hashable object; weights whose groups are equal share the subspace.
        overrides: whether its rank counts, and not what the settings ask for.
        resizable: whether its rule lets the rank change.
    """

    state: SubspaceState
    features: Features
    group: object
    overrides: bool = False
    resizable: bool = True

    def suits(self, shape: tuple[int, int], spec: SubspaceSpec) -> bool:
        """Return whether it can become a subspace of a shape (n, r).

        Raises:
            ValueError: it has the shape, and comes from a rule whose bases the rule of ``spec`` cannot go on with.
        """
        if self.state.shape != shape:
            return False
        rule, code = spec.rule, self.state.code
        if rule.coded != (code is not None) or (code is not None and code.shape != rule.first_code(shape[1], 0).shape):
            raise ValueError(f"the checkpoint has a basis of another rule than the backend's, {rule.name!r}")
        return True
