"""The list of mutants does not rot: every break can still be made, and the tests that must notice it exist."""

from __future__ import annotations

import ast
import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("oasis_fx_mutants", Path(__file__).with_name("mutants.py"))
assert SPEC is not None and SPEC.loader is not None
mutants = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = mutants  # dataclasses look their module up there
SPEC.loader.exec_module(mutants)

LIST = mutants.load()


def test_names_are_of_one_mutant_each() -> None:
    names = [mutant.name for mutant in LIST]
    assert len(set(names)) == len(names) >= 40


def problem_of(mutant) -> str:
    """Why a mutant cannot be made, or be noticed; empty where all is well."""
    text = (mutants.ROOT / mutant.file).read_text()
    try:
        broken = mutant.broken(text)
    except ValueError as error:
        return str(error)
    if ast.dump(ast.parse(broken)) == ast.dump(parsed(mutant.file)):
        return f"{mutant.name}: it changes nothing but the layout of {mutant.file}"
    named = [test.partition("::") for test in mutant.tests]
    gone = ["::".join((file, test)) for file, _, test in named if test.partition("[")[0] not in functions(file)]
    return f"{mutant.name}: {gone or 'no test'}" if gone or not mutant.tests else ""


def test_every_mutant_can_be_made_and_its_tests_exist() -> None:
    """One test for all of them: a compiler that begins anew for each would take the most of the time."""
    assert all(mutant.why for mutant in LIST)
    assert [problem for mutant in LIST if (problem := problem_of(mutant))] == []


def test_an_old_text_that_is_gone_or_ambiguous_is_refused() -> None:
    mutant = mutants.Mutant("a name", "a file", "x", "y", (), "")
    for text, count in (("", 0), ("x x", 2)):
        with pytest.raises(ValueError, match=f"a name: its old text occurs {count} times in a file"):
            mutant.broken(text)


@cache
def parsed(file: str) -> ast.Module:
    return ast.parse((mutants.ROOT / file).read_text())


@cache
def functions(file: str) -> frozenset[str]:
    """The functions in a file; none where there is no file."""
    if not (mutants.ROOT / file).is_file():
        return frozenset()
    return frozenset(node.name for node in ast.walk(parsed(file)) if isinstance(node, ast.FunctionDef))
