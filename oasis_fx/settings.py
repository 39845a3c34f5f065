"""The settings of a backend, which are checked when they are given, before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from oasis_fx.memory.sizes import parse_bytes
from oasis_fx.ranks import AutoRank, check_rank, columns_of
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
    "*.head.*",
    "classifier.*",
    "*.classifier.*",
    "output_projection.*",
    "*.output_projection.*",
)

Rank = int | float | AutoRank | Mapping[str, int | float]


@dataclass(frozen=True)
class Settings:
    """The checked settings of one backend; `oasis_fx.oasis_backend` says what each means.

    Raises:
        ValueError: a setting has a value that is not allowed; the message names both, and what is allowed.
    """

    rank: Rank = 32
    subspace: str | Rule = "oja"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    inner: str = "inductor"
    memory_budget: float | str = 1.0
    stats: bool = True
    tail: int | float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "subspace", rule_of(self.subspace))
        if isinstance(self.rank, Mapping):
            for key, rank in self.rank.items():
                check_rank(rank, f"rank[{key!r}]")
            if not self.rank:
                raise ValueError("rank is {}: give at least one glob, such as {'*': 32}")
            object.__setattr__(self, "rank", MappingProxyType(dict(self.rank)))
        elif not isinstance(self.rank, AutoRank):
            check_rank(self.rank, "rank", ", AutoRank of such a fraction, or a dict of globs to ranks")
        elif not isinstance(self.rule, StatisticRule):
            raise ValueError(
                f"rank is {self.rank!r}: ranks are shared out by the statistic of a rule, and "
                f"subspace={self.rule.name!r} has none; 'oja' and 'gradient_oja' have"
            )
        _check_choice("inner", self.inner, INNER_COMPILERS)
        self._check_tail()
        budget = self.memory_budget
        if (parse_bytes(budget) is None) if isinstance(budget, str) else not (_is_number(budget) and 0 <= budget <= 1):
            raise ValueError(f"memory_budget is {budget!r}: it must be a number from 0 to 1, or a size such as '12GiB'")
        if not isinstance(self.stats, bool):
            raise ValueError(f"stats is {self.stats!r}: it must be True or False")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _globs(name, getattr(self, name)))
        if mistaken := sorted((set(self.__dataclass_fields__) - {"options", "memory_budget"}) & set(self.options)):
            raise ValueError(
                f"options names {', '.join(map(repr, mistaken))}: options are Inductor's, and settings of oasis_fx are "
                f"given by backend=oasis_backend({mistaken[0]}=...)"
            )
        if "custom_partitioner_fn" in self.options:
            raise ValueError("options names 'custom_partitioner_fn': remove it, oasis_fx sets a partitioner of its own")

    def _check_tail(self) -> None:
        if self.tail is None:
            return
        check_rank(self.tail, "tail", ", or None")
        if not (isinstance(self.rule, StatisticRule) and self.rule.on == "activation" and not self.rule.dense):
            raise ValueError(
                f"tail is {self.tail!r}: it goes with rules that move the basis of an activation by its statistic, "
                f"such as 'oja', and subspace={self.rule.name!r} does not"
            )

    @property
    def rule(self) -> Rule:
        """The rule by which bases are chosen and move."""
        return rule_of(self.subspace)

    @property
    def share(self) -> float | None:
        """The share of in_features in ``rank=AutoRank(share)``, or None for any other rank."""
        return self.rank.share if isinstance(self.rank, AutoRank) else None

    @property
    def budget(self) -> int | float | None:
        """The memory budget in bytes (int), as a share (float), or None where none was set."""
        if isinstance(self.memory_budget, str):
            return parse_bytes(self.memory_budget)
        return None if self.memory_budget == 1.0 else float(self.memory_budget)

    def rank_of(self, name: str, in_features: int) -> int | None:
        """Return the number of columns, at most ``in_features``, that the basis of the weight ``name`` begins with.

        It is None where ``rank`` is a dict of globs and none of them matches.
        """
        rank = self.rank_asked_for(name)
        return None if rank is None else columns_of(rank, in_features)

    def rank_asked_for(self, name: str) -> int | float | None:
        """Return the rank of the weight ``name`` as it was given, a number of columns or a fraction of in_features."""
        if isinstance(self.rank, Mapping):
            return next((rank for glob, rank in self.rank.items() if fnmatchcase(name, glob)), None)
        return self.rank.share if isinstance(self.rank, AutoRank) else self.rank

    def tail_of(self, in_features: int, rank: int) -> int:
        """Return the number of columns of the tail beside a basis of a rank, at most all that are left."""
        return 0 if self.tail is None else min(columns_of(self.tail, in_features), in_features - rank)

    def reason_to_skip(self, name: str) -> str | None:
        """Return why the settings leave the weight ``name`` alone, or None where they do not."""
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
        """Return all globs that the user gave, those of ``include``, ``exclude`` and ``rank``."""
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
