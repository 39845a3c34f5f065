"""The list of mutants: deliberate breaks of the code, each with the tests that must notice it.

A mutant is an entry of one of the ``.toml`` files beside this one:

    [[mutant]]
    name = "the verifier is not called"
    file = "oasis_fx/compile/pipeline.py"
    old = '''exact text, found once in the file'''
    new = '''what stands there in the mutant'''
    tests = ["tests/passes/test_rewrites.py::test_name"]
    why = "one line: what goes wrong without a word"

``make mutants`` runs them (`run.py`); `test_mutants.py` keeps the list from rotting.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Mutant:
    """One break of the code. ``tests`` are node ids of pytest, of which at least one must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str

    def broken(self, text: str) -> str:
        """The text of ``file`` with the break in it.

        Raises:
            ValueError: the old text does not occur exactly once.
        """
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: its old text occurs {count} times in {self.file}, it must be once")
        return text.replace(self.old, self.new)


def load() -> list[Mutant]:
    """All mutants, in the order of the files and of their entries."""
    found = []
    for file in sorted(HERE.glob("*.toml")):
        for entry in tomllib.loads(file.read_text())["mutant"]:
            found.append(Mutant(**{**entry, "tests": tuple(entry["tests"])}))
    return found
