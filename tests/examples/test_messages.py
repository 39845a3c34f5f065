"""The messages that docs/troubleshooting.md quotes are those of the code, word for word."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUOTED = re.compile(r"`([^`]+)`")
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = [
    quoted
    for lead in re.findall(r"^\*\*(.+?)\*\*", PAGE[PAGE.index("## Messages") :], re.MULTILINE | re.DOTALL)
    for quoted in QUOTED.findall(lead.partition(", of ")[0])
]


@cache
def texts() -> str:
    """All texts of the code, a line each; `\\0` where something is filled in."""
    found = []
    for folder in ("oasis_fx", "passes", "runtime"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_code(message) -> None:
    filled = r"[^\n]*?\0[^\n]*?"
    pattern = filled.join(re.escape(part) for part in message.split("..."))
    assert re.search(pattern, texts()), f"no message of the code reads {message!r}"


def test_messages_are_found() -> None:
    """The lists are not empty, and a message that the code does not have would be noticed."""
    assert len(MESSAGES) >= 20
    with pytest.raises(AssertionError):
        test_a_quoted_message_is_in_the_code("the basis of ... has gone away")


def test_every_mistake_of_the_tests_has_a_row() -> None:
    """What `tests/compile/test_mistakes.py` expects to be told stands on the page."""
    for words in (
        "backend is oasis_backend itself",
        "options names",
        "over the width of",
        "no weight matches",
        "nothing was compiled for training",
        "has moved since the backward pass",
        "is given full-size gradients",
        "it must be the class of one of our optimizers",
        "is in a subspace",
    ):
        assert words in PAGE
