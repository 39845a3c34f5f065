"""Keep what packages say to their own developers off the terminal."""

from __future__ import annotations

import logging
import os
import warnings


def silence() -> None:
    """Show errors alone of packages that tell of kernels for other builds of torch, and no warnings but ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree", "torch._dynamo"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for kind in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=kind, module=r"(?!oasis_fx)")
