"""Two texts side by side, with the lines that differ marked, and coloured on a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import TextIO

COLOR_CHOICES = ("auto", "always", "never")

_RED, _GREEN, _PLAIN = "\033[31m", "\033[32m", "\033[0m"
_MARKS = {"equal": " ", "delete": "<", "insert": ">", "replace": "|"}


def wants_color(choice: str, stream: TextIO) -> bool:
    """Tell whether to colour what goes to ``stream``: ``auto`` does on a terminal, unless NO_COLOR is set."""
    return choice == "always" or (choice == "auto" and stream.isatty() and not os.environ.get("NO_COLOR"))


def side_by_side(
    before: str, after: str, *, width: int = 160, color: bool = False, titles: tuple[str, str] | None = None
) -> str:
    """Return the lines of both texts in two columns; ``<``, ``>`` and ``|`` between them mark what differs.

    Args:
        width: of both columns together, in characters; longer lines are cut, with an ellipsis.
        color: lines that go in red, lines that come in green (ANSI).
        titles: of the columns.
    """
    column = max(20, (width - 3) // 2)
    rows = list(_rows(before.splitlines(), after.splitlines()))
    if titles is not None:
        rows = [("equal", *titles), ("equal", "", ""), *rows]
    lines: list[str] = []
    for kind, left, right in rows:
        left, right = _cut(left, column).ljust(column), _cut(right, column)
        if color and kind != "equal":
            left = f"{_RED}{left}{_PLAIN}" if left.strip() else left
            right = f"{_GREEN}{right}{_PLAIN}" if right else right
        lines.append(f"{left} {_MARKS[kind]} {right}".rstrip())
    return "\n".join(lines) + "\n"


def _rows(before: list[str], after: list[str]) -> Iterator[tuple[str, str, str]]:
    for kind, i, i_end, j, j_end in SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        left, right = before[i:i_end], after[j:j_end]
        for number in range(max(len(left), len(right))):
            one = left[number] if number < len(left) else None
            other = right[number] if number < len(right) else None
            part = kind if one is not None and other is not None else "delete" if other is None else "insert"
            yield part, one or "", other or ""


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."
