"""Warnings of oasis_fx, and the one policy for failures.

An exception in any analysis or pass of ours compiles the graph as it came, with one warning that carries the exception.
Training is then right and takes the memory of stock `torch.compile`. Errors on purpose (a bad setting, a glob that
matches nothing, what is refused) are raised elsewhere and reach the user.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path

RAISE_VARIABLE = "OASIS_FX_RAISE"


class OasisWarning(UserWarning):
    """A warning that something was left undone. Training goes on without it, and is right."""


class Refused(RuntimeError):
    """The error of a way to use a compiled graph that cannot work; the message names the way and the cure."""


def survive(error: Exception, consequence: str, *, stacklevel: int = 2) -> None:
    """Warn that something of ours failed, with the exception and its place, and what that means for the user.

    Args:
        error: an exception that was caught.
        consequence: what is done without, as the beginning of a sentence.
        stacklevel: as in `warnings.warn`, counted from the caller.

    Raises:
        Exception: ``error`` itself, where the environment variable ``OASIS_FX_RAISE`` is set to anything but 0. The
            tests and CI set it, so that a fault of ours cannot hide behind a warning.
    """
    if os.environ.get(RAISE_VARIABLE, "0") not in ("", "0"):
        raise error
    text = f"{consequence}: {type(error).__name__}: {error} ({_place(error)})"
    warnings.warn(text, OasisWarning, stacklevel=stacklevel + 1)


def _place(error: Exception) -> str:
    """File, line and function of the innermost frame of ours, or of the innermost one at all."""
    frames = list(traceback.walk_tb(error.__traceback__))
    ours = [found for found in frames if str(found[0].f_globals.get("__name__")).startswith("oasis_fx.")]
    if not frames:
        return "place unknown"
    frame, line = (ours or frames)[-1]
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{line}, in {frame.f_code.co_name}"


def warn_user(message: str, category: type[Warning] = OasisWarning) -> None:
    """Warn, and name as the place of the warning the innermost line that is neither torch's nor ours."""
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "oasis_fx"):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, category, stacklevel=depth)
