"""Note which bases one call of a compiled graph has used, and tell whether they have moved since."""

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

    A basis that is chosen from the batch may move in the forward pass or, where the partitioner puts the computation of
    P there, in the backward pass: the operator that returns the basis notes which version it has returned.

    Attributes:
        call: the number by which operators find this object in `BY_CALL`.
    """

    def __init__(self) -> None:
        self.call = next(_calls)
        self._used: dict[Subspace, set[int]] = {}
        BY_CALL[self.call] = self

    def note(self, subspace: Subspace) -> None:
        """Note that the call uses the present version of a basis."""
        self._used.setdefault(subspace, set()).add(subspace.version)

    def hold(self, subspace: Subspace) -> bool:
        """Return whether all that the call has computed in a basis is in the coordinates of its present version."""
        return self._used.get(subspace, set()) <= {subspace.version}
