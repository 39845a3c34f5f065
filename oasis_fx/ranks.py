"""Ranks that people write: columns, fractions of in_features, and budgets to be shared out during training."""

from __future__ import annotations

import re
from dataclasses import dataclass

ALLOWED = "it must be a whole number from 1, or a fraction of in_features between 0 and 1"
ALL_COLUMNS = 10**6  # from this rank on, which no layer has, all columns of every basis are wanted
_AUTO = re.compile(r"auto:(0?\.\d+)")


@dataclass(frozen=True)
class AutoRank:
    """A budget of columns that is shared out over the subspaces during training, by captured energy.

    Each basis begins with ``share * in_features`` columns. At the optimizer's 100th and 1000th step the same memory is
    shared out anew. docs/subspaces.md, "Rank", has the rule.

    Args:
        share: of in_features, over 0 and under 1.

    Raises:
        ValueError: ``share`` is no such number.
    """

    share: float

    def __post_init__(self) -> None:
        if not isinstance(self.share, float) or not 0 < self.share < 1:
            raise ValueError(f"share is {self.share!r}: it must be a fraction of in_features between 0 and 1")


def check_rank(rank: object, name: str, otherwise: str = "") -> None:
    """Check a rank that is a number.

    Args:
        rank: what the user gave.
        name: what the message calls it.
        otherwise: what else would be allowed, as the end of a sentence.

    Raises:
        ValueError: ``rank`` is neither a whole number from 1 nor a fraction between 0 and 1.
    """
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise ValueError(f"{name} is {rank!r}: {ALLOWED}{otherwise}")
    if isinstance(rank, int):
        if rank < 1:
            raise ValueError(f"{name} is {rank!r}: {ALLOWED}")
    elif not 0 < rank < 1:  # false for NaN too
        raise ValueError(f"{name} is {rank!r}: {ALLOWED}")


def columns_of(rank: int | float, n: int) -> int:
    """Return the number of columns of a basis [n, r] that ``rank`` stands for, at most n."""
    return min(rank if isinstance(rank, int) else max(1, round(rank * n)), n)


def parse_auto_rank(text: str) -> AutoRank | None:
    """Return what ``auto:0.25`` stands for on a command line, or None where the text is not of that form."""
    match = _AUTO.fullmatch(text)
    share = float(match[1]) if match else 0.0
    return AutoRank(share) if 0 < share < 1 else None
