"""Ranks that people write: columns, fractions of in_features, and budgets to be shared out."""

from __future__ import annotations

import re

ALLOWED = "it must be a whole number from 1, or a fraction of in_features between 0 and 1"
_BUDGET = re.compile(r"auto:(0?\.\d+)")


def check_rank(rank: object, name: str, otherwise: str = "") -> None:
    """Raise ValueError where ``rank`` is neither; ``otherwise`` says what else would be allowed."""
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise ValueError(f"{name} is {rank!r}: {ALLOWED}{otherwise}")
    if isinstance(rank, int):
        if rank < 1:
            raise ValueError(f"{name} is {rank!r}: {ALLOWED}")
    elif not 0 < rank < 1:  # false for NaN too
        raise ValueError(f"{name} is {rank!r}: {ALLOWED}")


def columns_of(rank: int | float, n: int) -> int:
    """Columns of a basis [n, r], at most n."""
    return min(rank if isinstance(rank, int) else max(1, round(rank * n)), n)


def parse_budget(text: str) -> float | None:
    """``"auto:0.25"`` as a share between 0 and 1; None where it is none."""
    match = _BUDGET.fullmatch(text)
    share = float(match[1]) if match else 0.0
    return share if 0 < share < 1 else None
