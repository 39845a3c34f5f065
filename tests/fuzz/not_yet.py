"""What is known to fail and waits for its mending: programs with these features are drawn and not run.

Empty when nothing waits.
"""

from __future__ import annotations

from fuzz.program import Program

# Features that a program has together, and the reason.
NOT_YET: list[tuple[frozenset[str], str]] = []


def left_out(program: Program) -> str:
    """Why a program is not run, or nothing."""
    features = program.features()
    return next((reason for wanted, reason in NOT_YET if wanted <= features), "")
