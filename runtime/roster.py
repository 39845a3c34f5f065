"""A list that stays as it is, and remembers what was made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Roster(list[T]):
    """Weights, their updates or subspaces that are worked on together at many steps, always in the same order.

    The entries stay the same objects. The states behind them do too, as dictionaries; the tensors in these may be
    replaced, and the memory of weights may change. So what `once` keeps holds no tensors and no addresses.
    """

    _made: dict[object, Any]

    def once(self, make: Callable[..., Any], *args: Any) -> Any:
        """Return ``make(self, *args)``, made at the first call with these arguments.

        Args:
            make: a function at the top level of a module, of what stays the same from step to step.
            args: hashable.
        """
        try:
            return self._made[make, args]
        except AttributeError:
            self._made = {}
        except KeyError:
            pass
        made = self._made[make, args] = make(self, *args)
        return made


def once(entries: Sequence[T], make: Callable[..., Any], *args: Any) -> Any:
    """Return ``make(entries, *args)``; for a `Roster`, as it was made before."""
    return entries.once(make, *args) if isinstance(entries, Roster) else make(entries, *args)
