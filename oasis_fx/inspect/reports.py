"""The reports of all graphs of a backend, as a list that says why it is empty."""

from __future__ import annotations

from typing import Any

from oasis_fx.inspect.report import GraphReport

_NOTHING = (
    "nothing was compiled for training by this backend: call the model that torch.compile(model, backend=backend) "
    "returned, or model.compile(backend=backend) of a class of your own, once, with gradients on and not under "
    "torch.no_grad(), before you ask for its report; torch.compiler.reset() forgets what was compiled"
)


class Reports(list[GraphReport]):
    """Reports, one for each compiled graph; `str()` of the list is their tables."""

    def __getitem__(self, index: Any) -> Any:
        """Return one report or several.

        Raises:
            IndexError: there is no such report; where there is none at all the message says what to do.
        """
        if not self and not isinstance(index, slice):
            raise IndexError(_NOTHING)
        return super().__getitem__(index)

    def __str__(self) -> str:
        return "\n\n\n".join(map(str, self)) if self else _NOTHING
