"""The fuzzer as a program: `python tests/fuzz`.

    python tests/fuzz --count 10000          seeds 0 to 9999, those of runs/fuzz aside that are done
    python tests/fuzz --seed 123             one seed: its text, its verdict, shrunk where it fails
    python tests/fuzz --seed 123 --as-is     without shrinking

What is finished is kept a line a seed in runs/fuzz/<digest>.jsonl, for the digest of the files that draw programs:
where these change, a seed is another program. Programs run in child processes, 100 seeds each, since a compiler leaves
much behind.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fuzz.calling import alone
from fuzz.not_yet import left_out
from fuzz.oracle import Verdict, draw, judge
from fuzz.program import Program
from fuzz.shrink import shrink

HERE = Path(__file__).resolve().parent
DRAWING = ("program", "roads", "operations", "calling", "drawing", "statements", "generate")
IN_ONE_PROCESS = 100
SECONDS_EACH = 0.6  # of one core, by experience


def digest() -> str:
    """Of what a seed's program depends on."""
    return hashlib.sha256(b"".join((HERE / f"{name}.py").read_bytes() for name in DRAWING)).hexdigest()[:12]


def fails_like(verdict: Verdict) -> Any:
    """Whether a program fails as ``verdict`` says."""

    def fails(program: Program) -> bool:
        found = judge(program)
        return (found.kind, found.what) == (verdict.kind, verdict.what)

    return fails


def run_seed(seed: int) -> dict[str, Any]:
    """Judge the program of a seed; what is kept of it."""
    started = time.monotonic()
    program = draw(seed)
    reason = left_out(program)
    verdict = Verdict("left out", reason) if reason else judge(program)
    return {
        "seed": seed, "kind": verdict.kind, "what": verdict.what, "detail": verdict.detail, "counts": verdict.counts,
        "seconds": round(time.monotonic() - started, 2), "features": sorted(program.features()),
    }  # fmt: skip


def show(seed: int, *, as_is: bool = False) -> Verdict:
    """Print the program of a seed and its verdict; one that fails is shrunk first."""
    program = draw(seed)
    verdict = judge(program)
    if verdict.failed and not as_is:
        program = shrink(program, fails_like(verdict))
        verdict = judge(program)
    print(alone(program))
    print(f"# seed {seed}: {verdict.kind}. {verdict.what} {verdict.detail}\n# {verdict.counts}", flush=True)
    return verdict


def read(file: Path) -> dict[int, dict[str, Any]]:
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may have been cut off
    return {row["seed"]: row for row in rows}


def run_children(seeds: Iterable[int], file: Path) -> None:
    """Run seeds in child processes, a hundred each; one that kills its process is written down as a crash."""
    waiting = list(seeds)
    while waiting:
        batch = waiting[:IN_ONE_PROCESS]
        command = [sys.executable, "-P", str(HERE), "--child", str(file), "--seeds", *map(str, batch)]
        code = subprocess.run(command, stderr=subprocess.DEVNULL).returncode
        done = read(file)
        missing = [seed for seed in batch if seed not in done]
        if missing and code != 0:  # the first of them was running
            row = {
                "seed": missing[0],
                "kind": "crash",
                "what": f"crash: process died ({code})",
                "detail": "",
                "counts": {},
            }
            append(file, row)
        waiting = [seed for seed in waiting if seed not in read(file)]


def append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")


def failed(row: dict[str, Any]) -> bool:
    return row["kind"] in ("wrong", "crash", "warning")


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """Programs, comparisons, failures; the last a line each."""
    rows = list(rows)
    kinds: Counter[str] = Counter(row["kind"] for row in rows)
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row["counts"])
    missed = {kind: number for kind, number in sorted(counts.items()) if kind.startswith("not compared")}
    made = {kind: number for kind, number in sorted(counts.items()) if kind not in missed}
    seconds = sum(row.get("seconds", 0) for row in rows)
    lines = [
        f"{len(rows)} programs, {sum(made.values())} comparisons, {seconds:.0f} s",
        *(f"  {number} {kind}" for kind, number in (made | missed).items()),
        f"{kinds['wrong']} wrong, {kinds['crash']} crashes that stock does not have, {kinds['warning']} warnings",
        f"{kinds['stock crashes']} crashes that stock has, {kinds['stock is wrong']} wrong under stock too, "
        f"{kinds['left out']} left out",
        *(_line(row) for row in rows if failed(row)),
    ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    return f"  seed {row['seed']}: {row['what']}: {row['detail'][:150]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="random programs under the backend against eager mode")
    parser.add_argument("--count", type=int, default=10_000, help="seeds 0 to this")
    parser.add_argument("--seed", type=int, help="one seed, printed")
    parser.add_argument("--as-is", action="store_true", help="do not shrink it")
    parser.add_argument("--again", action="store_true", help="run those anew that failed")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, nargs="*", help="these seeds alone")
    args = parser.parse_args()
    if args.child is not None:
        gc.freeze()  # what torch has imported is not looked through after each program
        gc.set_threshold(50_000, 20, 20)
        for seed in args.seeds:
            append(args.child, run_seed(seed))
        return
    if args.seed is not None:
        sys.exit(show(args.seed, as_is=args.as_is).failed)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{digest()}.jsonl"
    done = read(file)
    if args.again:
        done = {seed: row for seed, row in done.items() if not failed(row) and row["kind"] != "left out"}
        file.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
    seeds = args.seeds if args.seeds is not None else range(args.count)
    todo = [seed for seed in seeds if seed not in done]
    hours = len(todo) * SECONDS_EACH / 3600
    print(f"{len(todo)} of {len(seeds)} programs to run, about {hours:.1f} h on one core; kept in {file}", flush=True)
    for start in range(0, len(todo), IN_ONE_PROCESS):
        batch = todo[start : start + IN_ONE_PROCESS]
        run_children(batch, file)
        rows = read(file)
        bad = [rows[seed] for seed in batch if failed(rows[seed])]
        print("\n".join([f"seeds {batch[0]} to {batch[-1]}: {len(bad)} failed", *map(_line, bad)]), flush=True)
    rows = read(file)
    print(summary(rows[seed] for seed in seeds))
    sys.exit(any(failed(rows[seed]) for seed in seeds))
