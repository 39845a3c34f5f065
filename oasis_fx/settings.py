"""The settings of a backend: checked when given, before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from oasis_fx.memory.sizes import parse_bytes
from oasis_fx.ranks import check_rank, columns_of, parse_budget
from oasis_fx.runtime.subspaces.rules import Rule, StatisticRule, rule_of

INNER_COMPILERS = ("inductor", "aot_eager")

# Output heads: their input is small beside the logits, and their rows are the vocabulary.
DEFAULT_EXCLUDE = (
    "lm_head.*",
    "*.lm_head.*",
    "embed_out.*",
    "*.embed_out.*",
    "score.*",
    "*.score.*",
    "head.*",
    "classifier.*",
    "*.classifier.*",
    "output_projection.*",
    "*.output_projection.*",
)

Rank = int | float | str | Mapping[str, int | float]


@dataclass(frozen=True)
class Settings:
    """Checked settings of one backend; see `oasis_fx.backend.oasis_backend` for what they mean."""

    rank: Rank = 32
    subspace: str | Rule = "oja"
    subspace_lr: float | str | None = None
    subspace_every: int | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    inner: str = "inductor"
    memory_budget: float | str = 1.0
    stats: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rule = rule_of(self.subspace)  # raises where it is neither a name nor a rule
        if isinstance(self.rank, Mapping):
            for key, rank in self.rank.items():
                check_rank(rank, f"rank[{key!r}]")
            if not self.rank:
                raise ValueError("rank is {}: give at least one glob, such as {'*': 32}")
            object.__setattr__(self, "rank", MappingProxyType(dict(self.rank)))
        elif self.share is None:
            check_rank(
                self.rank, "rank", ", 'auto:' and such a fraction, or a dict of globs over weight names to ranks"
            )
        elif not isinstance(rule, StatisticRule):
            raise ValueError(
                f"rank is {self.rank!r}: it goes by the statistic of a rule, and subspace={rule.name!r} has none; "
                "'oja' and 'gradient_oja' have"
            )
        _check_choice("inner", self.inner, INNER_COMPILERS)
        rate = self.subspace_lr
        if rate not in (None, "auto") and not (_is_number(rate) and rate > 0):  # type: ignore[operator]
            raise ValueError(f"subspace_lr is {rate!r}: it must be a number over 0 (inf: power iteration), or 'auto'")
        every = self.subspace_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"subspace_every is {every!r}: it must be a whole number from 1")
        budget = self.memory_budget
        if (parse_bytes(budget) is None) if isinstance(budget, str) else not (_is_number(budget) and 0 <= budget <= 1):
            raise ValueError(f"memory_budget is {budget!r}: it must be a number from 0 to 1, or a size such as '12GiB'")
        if not isinstance(self.stats, bool):
            raise ValueError(f"stats is {self.stats!r}: it must be True or False")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _globs(name, getattr(self, name)))
        if "custom_partitioner_fn" in self.options:
            raise ValueError("options names 'custom_partitioner_fn': oasis_fx is one itself, it cannot take another")

    @property
    def rule(self) -> Rule:
        """How the bases are chosen and move."""
        return rule_of(self.subspace)

    @property
    def share(self) -> float | None:
        """Of ``rank="auto:SHARE"``, else None."""
        return parse_budget(self.rank) if isinstance(self.rank, str) else None

    @property
    def budget(self) -> int | float | None:
        """The memory budget in bytes (int), as a share (float), or None where none was set."""
        if isinstance(self.memory_budget, str):
            return parse_bytes(self.memory_budget)
        return None if self.memory_budget == 1.0 else float(self.memory_budget)

    def rank_of(self, name: str, in_features: int) -> int | None:
        """Columns of a weight's basis, at first, at most ``in_features``; None where no glob of ``rank`` names it."""
        rank: Any = self.rank if self.share is None else self.share
        if isinstance(rank, Mapping):
            rank = next((r for glob, r in rank.items() if fnmatchcase(name, glob)), None)
        return None if rank is None else columns_of(rank, in_features)

    def reason_to_skip(self, name: str) -> str | None:
        """Why the settings leave the weight ``name`` alone, or None."""
        if self.include is not None and not any(fnmatchcase(name, glob) for glob in self.include):
            return "not in include"
        globs, origin = (
            (DEFAULT_EXCLUDE, "output head, excluded by default") if self.exclude is None else (self.exclude, "")
        )
        for glob in globs:
            if fnmatchcase(name, glob):
                return origin or f"excluded by {glob!r}"
        if isinstance(self.rank, Mapping) and not any(fnmatchcase(name, glob) for glob in self.rank):
            return "no glob of rank names it"
        return None

    def globs(self) -> tuple[str, ...]:
        """Every glob that the user gave."""
        ranks = tuple(self.rank) if isinstance(self.rank, Mapping) else ()
        return (*(self.include or ()), *(self.exclude or ()), *ranks)


def _check_choice(name: str, given: object, allowed: Iterable[str]) -> None:
    if given not in tuple(allowed):
        raise ValueError(f"{name} is {given!r}: it must be one of {', '.join(map(repr, allowed))}")


def _is_number(given: object) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and not math.isnan(given)


def _globs(name: str, given: object) -> tuple[str, ...] | None:
    if given is None:
        return None
    items = (given,) if isinstance(given, str) else given
    if not isinstance(items, Iterable) or not all(isinstance(glob, str) and glob for glob in items):
        raise ValueError(f"{name} is {given!r}: it must be a glob over weight names, or several")
    return tuple(items)
