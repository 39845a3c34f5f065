"""Break the code on purpose, one break at a time, and see the tests that are named for it fail: ``make mutants``.

Every mutant is made in a copy of the tree; the working tree is never written to. A mutant is killed where pytest says
that a test failed, and not where it could not start or found no test. Before the mutants the same tests have to pass on
the copy as it is. Each run of pytest is a fork of this process, which has imported torch and none of our code.

    .venv/bin/python tests/mutants/run.py                    # all
    .venv/bin/python tests/mutants/run.py --only "*moved*"   # those whose name or file matches
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent))

from mutants import ROOT, Mutant, load

TESTS_FAILED = 1  # pytest's exit status; others are errors of collection or usage
LIMIT = 600  # seconds for the tests of one mutant


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: the test that killed it, or else why it counts as a failure."""

    mutant: Mutant
    killed_by: str
    problem: str
    seconds: float


class Copy:
    """A copy of the tree, and beside it the package as the wheel lays it out, by links into the copy."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.site, self.cache, self.log = (folder / name for name in ("tree", "site", "cache", "log"))
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.tree / name)
        package = self.site / "oasis_fx"
        package.mkdir(parents=True)
        for inside in [*(self.tree / "oasis_fx").iterdir(), self.tree / "passes", self.tree / "runtime"]:
            (package / inside.name).symlink_to(inside)

    def start(self, tests: Sequence[str], *options: str) -> int:
        """Run pytest on the copy in a process of its own; return its number."""
        process = os.fork()
        if process == 0:
            status = 70
            try:
                status = self._pytest([f"--timeout={LIMIT}", *options, *tests])
            finally:
                os._exit(status)
        return process

    def _pytest(self, arguments: Sequence[str]) -> int:
        os.setsid()  # so that what the tests start can be ended with them
        for number in (1, 2):
            os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.chdir(self.tree)
        sys.path[0] = str(self.site)  # before the installed package, for processes that tests start too
        os.environ["PYTHONPATH"], os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.site), str(self.cache)
        import pytest

        status = pytest.main(["-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-o", "pythonpath=", *arguments])
        sys.stdout.flush(), sys.stderr.flush()
        return int(status)


def finished(queue: Iterable[tuple[object, list[str], Mutant | None]], copies: Sequence[Copy]) -> Iterator[tuple]:
    """Run pytest for each (label, arguments, mutant) of a queue, as many at once as there are copies.

    Yields:
        (label, exit status, output, CPU seconds) as they end; the exit status is -1 for a mutant that cannot be made.
    """
    waiting, free, running = list(queue)[::-1], list(copies), {}
    while waiting or running:
        while waiting and free:
            label, arguments, mutant = waiting.pop()
            copy = free.pop()
            copy.log.unlink(missing_ok=True)
            whole = None
            if mutant is not None:
                file = copy.tree / mutant.file
                whole = file, file.read_text()
                try:
                    file.write_text(mutant.broken(whole[1]))
                except ValueError as error:
                    free.append(copy)
                    yield label, -1, str(error), 0.0
                    continue
            running[copy.start(arguments)] = label, copy, whole
        if not running:
            continue
        process, status, used = os.wait3(0)
        label, copy, whole = running.pop(process)
        if whole is not None:
            whole[0].write_text(whole[1])
        try:
            os.killpg(process, signal.SIGKILL)  # what a killed test has left behind
        except ProcessLookupError:
            pass
        free.append(copy)
        output = copy.log.read_text() if copy.log.exists() else ""
        yield label, os.waitstatus_to_exitcode(status), output, used.ru_utime + used.ru_stime


def verdict_of(mutant: Mutant, status: int, output: str, seconds: float) -> Verdict:
    if status == TESTS_FAILED:
        failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in output.splitlines() if "FAILED " in line]
        if failed:
            return Verdict(mutant, failed[0].rpartition("::")[2], "", seconds)
    if status == 0:
        return Verdict(mutant, "", "SURVIVED", seconds)
    if status == -1:
        return Verdict(mutant, "", output, seconds)
    return Verdict(mutant, "", f"pytest ended with {status}: {' '.join(output.split()[-60:])}", seconds)


def by_file(mutants: Sequence[Mutant]) -> dict[str, list[str]]:
    """All tests that the mutants name, by their file."""
    found: dict[str, list[str]] = {}
    for test in dict.fromkeys(test for mutant in mutants for test in mutant.tests):
        found.setdefault(test.partition("::")[0], []).append(test)
    return found


def prepare() -> None:
    """Import what every run of pytest would, once."""
    os.environ |= {
        "PYTHONDONTWRITEBYTECODE": "1",  # a file changes several times within a second
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of processes, which a fork would share
    }
    sys.dont_write_bytecode = True
    import functorch.compile
    import hypothesis
    import pytest
    import torch._dynamo
    import torch._inductor.compile_fx

    assert "oasis_fx" not in sys.modules and hypothesis and pytest and functorch
    torch.set_num_threads(1)
    gc.freeze()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="glob over names and files of mutants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at once; default: %(default)s")
    parser.add_argument("--trust", action="store_true", help="do not run the tests on the code as it is first")
    parser.add_argument("--list", action="store_true", help="print the mutants and leave")
    arguments = parser.parse_args()
    glob = arguments.only
    chosen = [m for m in load() if fnmatch.fnmatchcase(m.name, glob) or fnmatch.fnmatchcase(m.file, glob)]
    if not chosen:
        parser.error(f"no mutant's name or file matches {glob!r}")
    if arguments.list:
        print(tabulate([(m.file, m.name, m.why) for m in chosen], headers=["file", "mutant", "why it matters"]))
        return 0
    prepare()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [Copy(Path(folder) / str(number)) for number in range(arguments.jobs)]
        print(f"{len(chosen)} mutants; first, their tests on the code as it is", flush=True)
        whole = [(file, tests, None) for file, tests in by_file(chosen).items() if not arguments.trust]
        failures, used = [], 0.0
        for file, status, output, seconds in finished(whole, copies):
            used += seconds
            if status != 0:
                failures.append((file, output))
        for file, output in failures:
            print(f"{file}:\n{output[-3000:]}\nthese tests have to pass before they can kill anything")
        if failures:
            return 1
        verdicts: dict[str, Verdict] = {}
        for mutant, status, output, seconds in finished(((m, ["-x", *m.tests], m) for m in chosen), copies):
            verdict = verdicts[mutant.name] = verdict_of(mutant, status, output, seconds)
            print(f"{'killed' if verdict.killed_by else verdict.problem}: {mutant.name}", flush=True)
    found = [verdicts[mutant.name] for mutant in chosen]
    rows = [(v.mutant.file, v.mutant.name, v.killed_by or v.problem, f"{v.seconds:.0f}") for v in found]
    print(tabulate(rows, headers=["file", "mutant", "killed by", "CPU s"], maxcolwidths=[None, 60, 70, None]))
    alive = [verdict for verdict in found if not verdict.killed_by]
    minutes, used = (time.monotonic() - start) / 60, (used + sum(verdict.seconds for verdict in found)) / 60
    print(f"{len(found) - len(alive)} of {len(found)} mutants killed in {minutes:.1f} minutes, {used:.1f} of a CPU")
    for verdict in alive:
        print(f"{verdict.mutant.name} ({verdict.mutant.file}): {verdict.problem}\n  {verdict.mutant.why}")
    return 1 if alive else 0


if __name__ == "__main__":
    raise SystemExit(main())
