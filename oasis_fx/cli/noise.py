"""Keep what other packages say to their own developers off the terminal."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from oasis_fx.errors import OasisWarning

# torchao says "Failed to load ..." of kernels for other builds of torch, pytree that torchao's enums are registered as
# they need not be, Dynamo that its caches are off, which we want. What is an error is raised as well, and told once.
_LOGGERS = ("torchao", "torch.utils._pytree", "torch._dynamo", "torch._subclasses.fake_tensor", "torch.fx")
_TRANSFORMERS = "TRANSFORMERS_VERBOSITY"  # which sets up its own logger when it is imported


@contextmanager
def without_noise() -> Iterator[None]:
    """Show nothing that other packages log, and of warnings those of ours alone."""
    os.environ.setdefault(_TRANSFORMERS, "error")
    before = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            for kind in (UserWarning, FutureWarning, DeprecationWarning, SyntaxWarning):
                warnings.filterwarnings("ignore", category=kind, module=r"(?!oasis_fx)")
            warnings.filterwarnings("default", category=OasisWarning)  # whose place may be the user's line
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
