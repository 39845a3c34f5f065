"""`python tests/fuzz`: see `fuzz.runner`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fuzz.runner import main  # noqa: E402

if __name__ == "__main__":
    main()
