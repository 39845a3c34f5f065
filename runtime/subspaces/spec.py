"""What is asked of a subspace, which never changes: its rank, its rule and its tail."""

from __future__ import annotations

from dataclasses import dataclass, replace

from oasis_fx.runtime.subspaces.rules import Rule, rule_of


@dataclass(frozen=True)
class SubspaceSpec:
    """What a subspace is asked to be.

    Attributes:
        rank: columns of the basis, from 1.
        rule: how the basis is chosen and moves, with its settings; a name stands for the rule with its defaults.
        budget: share of n to begin with, where ``rank`` is shared out during training
            (`oasis_fx.runtime.subspaces.rank_allocation`).
        tail: columns beside the basis that are drawn anew at each optimizer step (`oasis_fx.runtime.subspaces.tails`),
            at most n less the rank; 0 for none.

    Raises:
        ValueError: the rank is less than 1, the tail less than 0, or no rule has the name. The message has the value
            and what is allowed.
    """

    rank: int
    rule: Rule = "oja"  # type: ignore[assignment]
    budget: float | None = None
    tail: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", rule_of(self.rule))
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}: it must be a whole number from 1")
        if self.tail < 0:
            raise ValueError(f"tail is {self.tail!r}: it must be a whole number from 0")

    def with_rank(self, rank: int, n: int) -> SubspaceSpec:
        """Return the specification with another rank, and as much of its tail as n rows leave room for."""
        return replace(self, rank=rank, tail=min(self.tail, n - rank))
