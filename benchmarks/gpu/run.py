"""All that is to be known of a GPU, in one command on a bare machine: `make gpu`.

    python3 -m benchmarks.gpu.run --out FOLDER [--parts kernels,optimizer_step] [--minutes 9] [--device cpu --tiny]

The parts run one after the other, most telling first, each in a process of its own with a time limit of its own. What a
part has found is in FOLDER as soon as it is found, with the device and the versions of torch and Triton. A part that
fails or is cut off does not stop the next ones. It takes torch, Triton, transformers, peft, tabulate and pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.parts import PARTS, Part


def main() -> None:
    args = _parse()
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    summary = []
    for part in PARTS:
        if args.parts and part.name not in args.parts:
            continue
        left = end - time.monotonic()
        # Small sizes are for the CPU of a test, which may be busy with other work.
        limit = left if args.tiny else min(part.seconds, left)
        ended = _run(part, limit, args) if left > 0 else "no time was left"
        summary.append(f"{part.name}: {ended}")
        print(f"== {summary[-1]}", flush=True)
        (args.out / "summary.txt").write_text("\n".join(summary) + "\n")
    print("\n".join(summary))


def _run(part: Part, limit: float, args: argparse.Namespace) -> str:
    command = [sys.executable, *part.command(args.out, args.device, args.tiny)]
    print(f"== {part.name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    # A group of its own: a part that is cut off takes along the processes that it has started.
    environment = os.environ | part.environment | {"OASIS_FX_REPORT": str(args.out / f"{part.name}.txt")}
    process = subprocess.Popen(command, process_group=0, env=environment)
    try:
        code: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    took = f"{time.monotonic() - start:.0f} s"
    if code is None:
        return f"cut off after {took}"
    return f"done in {took}" if code == 0 else f"failed with exit status {code} after {took}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", type=_parts, help="names by commas; by default all")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part runs beyond this")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that every part runs")
    return parser.parse_args()


def _parts(text: str) -> list[str]:
    names, known = text.split(","), [part.name for part in PARTS]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"no part is called {name!r}: it must be one of {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
