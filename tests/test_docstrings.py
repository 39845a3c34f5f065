"""Docstrings of what users call, and of the runtime: each says what is raised, and begins with a sentence."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    [
        *(ROOT / "oasis_fx").glob("*.py"),
        *(file for room in ("cli", "distributed", "integrations") for file in (ROOT / "oasis_fx" / room).glob("*.py")),
        *(ROOT / "runtime").rglob("*.py"),
    ]
)
SPECIAL = ("__init__", "__post_init__", "__new__")  # what they raise is said where the class is described


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body)


def raises(node: ast.FunctionDef | ast.ClassDef) -> bool:
    if isinstance(node, ast.ClassDef):
        return any(raises(inner) for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name in SPECIAL)
    returned = {ast.unparse(found.value) for found in node.body if isinstance(found, ast.Return) and found.value}
    # What a returned function raises, it raises elsewhere.
    own = (part for part in node.body if not (isinstance(part, ast.FunctionDef) and part.name in returned))
    return any(isinstance(found, ast.Raise) for part in own for found in ast.walk(part))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_raised_is_said(file: Path) -> None:
    nodes = list(public(ast.parse(file.read_text()).body))
    silent = [n.name for n in nodes if raises(n) and "Raises:" not in (ast.get_docstring(n) or "")]
    assert silent == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_docstring_begins_with_a_sentence(file: Path) -> None:
    for node in public(ast.parse(file.read_text()).body):
        text = ast.get_docstring(node)
        if text is not None:
            first = text.split("\n\n")[0]
            assert first[0] == first[0].upper() and first.endswith((".", ":")), node.name


# A sentence about what a function does begins with its verb; what begins with one of these is a fragment.
FRAGMENTS = {"A", "An", "All", "Another", "As", "Each", "How", "Of", "The", "What", "Where", "Whether", "Which"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_docstring_of_a_function_begins_with_a_verb(file: Path) -> None:
    """An IDE shows a first line alone. That of a property says what its value is, as that of a class does."""
    for node in public(ast.parse(file.read_text()).body):
        text = ast.get_docstring(node)
        is_function = isinstance(node, ast.FunctionDef) and not any(
            "property" in ast.unparse(d) for d in node.decorator_list
        )
        if text is not None and is_function:
            assert text.split()[0] not in FRAGMENTS and text[0].isalpha(), node.name
