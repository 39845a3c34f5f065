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


@pytest.mark.parametrize("mutant", LIST, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_made_and_its_tests_exist(mutant) -> None:
    text = (mutants.ROOT / mutant.file).read_text()
    broken = mutant.broken(text)
    assert broken != text and mutant.why
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(text))  # it is Python, and not a change of layout alone
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions(file), test


def test_an_old_text_that_is_gone_or_ambiguous_is_refused() -> None:
    mutant = mutants.Mutant("a name", "a file", "x", "y", (), "")
    for text, count in (("", 0), ("x x", 2)):
        with pytest.raises(ValueError, match=f"a name: its old text occurs {count} times in a file"):
            mutant.broken(text)


@cache
def functions(file: str) -> frozenset[str]:
    tree = ast.parse((mutants.ROOT / file).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
