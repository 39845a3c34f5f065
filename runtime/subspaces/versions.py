"""Which bases one call of a compiled graph has used, and whether they have moved since."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from oasis_fx.runtime.subspaces.subspace import Subspace

# By number, since a compiled graph takes tensors alone: how an operator within one finds its call.
BY_CALL: WeakValueDictionary[int, Versions] = WeakValueDictionary()
_calls = itertools.count(1)


class Versions:
    """The versions of the bases that one call of a compiled graph has used.

    A basis that is chosen from the batch may move in the forward pass or, where the partitioner has P computed there,
    in the backward pass: the operator that returns it notes which version it has returned.

    Attributes:
        call: the number by which operators find this object in `BY_CALL`.
    """

    def __init__(self) -> None:
        self.call = next(_calls)
        self._used: dict[Subspace, set[int]] = {}
        BY_CALL[self.call] = self

    def note(self, subspace: Subspace) -> None:
        """Note that the present version of the basis is used."""
        self._used.setdefault(subspace, set()).add(subspace.version)

    def hold(self, subspace: Subspace) -> bool:
        """Return whether all that was computed in the basis is still in its coordinates."""
        return self._used.get(subspace, set()) <= {subspace.version}
