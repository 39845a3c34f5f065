"""The command line, as ``python -m oasis_fx`` and ``oasis-fx``: `oasis_fx.cli`."""

import sys

from oasis_fx.cli.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
