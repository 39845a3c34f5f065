"""The arguments that all parts of the GPU run take."""

from __future__ import annotations

import argparse


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of ``--out``, ``--device`` and ``--tiny``, to which a part may add its own."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", required=True, help="folder for the results")
    made.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    made.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    return made
