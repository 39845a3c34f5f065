"""Two texts side by side, with the lines that differ marked, and coloured on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher

_RED, _GREEN, _PLAIN = "\033[31m", "\033[32m", "\033[0m"
_MARKS = {"equal": " ", "delete": "<", "insert": ">", "replace": "|"}


def side_by_side(before: str, after: str, *, width: int = 160, color: bool = False, context: int | None = None) -> str:
    """Return the lines of both texts in two columns; ``<``, ``>`` and ``|`` between them mark what differs.

    Args:
        width: of both columns together, in characters; longer lines are cut, with an ellipsis.
        color: lines that go in red, lines that come in green (ANSI).
        context: equal lines to show around each difference; None: all.
    """
    column = max(20, (width - 3) // 2)
    rows = list(_rows(before.splitlines(), after.splitlines()))
    shown = _shown(rows, context)
    lines: list[str] = []
    for index, (kind, left, right) in enumerate(rows):
        if index not in shown:
            if index == 0 or index - 1 in shown:
                lines.append("...")
            continue
        left, right = _cut(left, column).ljust(column), _cut(right, column)
        if color and kind != "equal":
            left, right = f"{_RED}{left}{_PLAIN}", f"{_GREEN}{right}{_PLAIN}"
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


def _shown(rows: list[tuple[str, str, str]], context: int | None) -> set[int]:
    if context is None:
        return set(range(len(rows)))
    changed = [index for index, (kind, *_) in enumerate(rows) if kind != "equal"]
    return {near for index in changed for near in range(index - context, index + context + 1)}


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."
