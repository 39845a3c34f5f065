"""How long it takes to import oasis_fx beside torch, and to make an optimizer, in turns, a new process each.

python -m benchmarks.import_time --pairs 11
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

# Making an optimizer loads torch._dynamo, torch's own as well as ours.
_MADE = "(list(torch.nn.Linear(2, 2).parameters()))"
STATEMENTS = {
    "the import": ("import torch", "import oasis_fx"),
    "import and optimizer": (
        f"import torch; torch.optim.AdamW{_MADE}",
        f"import torch; from oasis_fx import OasisAdamW, oasis_backend; OasisAdamW{_MADE}",
    ),
}
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11, help="processes of each, in turns (default: 11)")
    pairs = parser.parse_args(argv).pairs
    if pairs < 1:
        raise ValueError(f"--pairs is {pairs}: it must be a whole number from 1")
    for what, (stock, ours) in STATEMENTS.items():
        _seconds(stock), _seconds(ours)  # the first import reads files from the disk
        ratios = []
        for _ in range(pairs):
            reference = _seconds(stock)
            ratios.append(_seconds(ours) / reference)
        print(
            f"{what}, oasis_fx to torch: {statistics.median(ratios):.2f} "
            f"(median of {pairs} pairs, from {min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def _seconds(statement: str) -> float:
    code = TIMED.format(statement)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    main()
