"""Private modules of torch, told by the code that calls us."""

from __future__ import annotations

import sys


def asked_by_compiler() -> bool:
    """Return whether torch.compile calls the function that calls this one.

    It looks at the gradients of its inputs too, to tell memory apart, whenever a graph is compiled while gradients are
    there, as in the middle of an accumulation. Nothing is read or written then.
    """
    name = str(sys._getframe(2).f_globals.get("__name__"))
    return name.startswith(("torch._subclasses", "torch._dynamo", "torch._functorch", "torch._inductor"))
