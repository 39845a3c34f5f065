"""How long it takes to import what a program needs of oasis_fx, beside `import torch`, in turns, a new process each.

python -m benchmarks.import_time --pairs 11
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

STATEMENTS = {"torch": "import torch", "oasis_fx": "from oasis_fx import OasisAdamW, oasis_backend"}
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11, help="processes of each, in turns (default: 11)")
    pairs = parser.parse_args(argv).pairs
    if pairs < 1:
        raise ValueError(f"--pairs is {pairs}: it must be a whole number from 1")
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for name in seconds:
        _seconds(name)  # the first import reads files from the disk
    for _ in range(pairs):
        for name, taken in seconds.items():
            taken.append(_seconds(name))
    ratios = [ours / torchs for torchs, ours in zip(seconds["torch"], seconds["oasis_fx"], strict=True)]
    print(
        f"oasis_fx, torch included, to torch: {statistics.median(ratios):.2f} "
        f"(median of {pairs} pairs, from {min(ratios):.2f} to {max(ratios):.2f})"
    )


def _seconds(module: str) -> float:
    done = subprocess.run(
        [sys.executable, "-P", "-c", TIMED.format(STATEMENTS[module])], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


if __name__ == "__main__":
    main()
