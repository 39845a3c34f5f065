"""Private modules of torch, told by the code that calls us."""

from __future__ import annotations

import sys

from torch.autograd.graph import _engine_run_backward

_RUNS_ENGINE = _engine_run_backward.__code__


def asked_by_compiler() -> bool:
    """Return whether torch.compile calls the function that calls this one.

    It looks at the gradients of its inputs too, to tell memory apart, whenever a graph is compiled while gradients are
    there, as in the middle of an accumulation. Nothing is read or written then.
    """
    name = str(sys._getframe(2).f_globals.get("__name__"))
    return name.startswith(("torch._subclasses", "torch._dynamo", "torch._functorch", "torch._inductor"))


def called_by_engine() -> bool:
    """Return whether autograd's engine called the function that calls this one, and no Python code that it runs.

    On the CPU the engine works in the thread of ``backward()``. Its threads for devices have no Python frames.
    """
    frame = sys._getframe(1).f_back
    return frame is None or frame.f_code is _RUNS_ENGINE
