"""Arguments of `oasis_backend` in 0.2, for one release: each works, with a DeprecationWarning that has the new form."""

from __future__ import annotations

from typing import Any

from oasis_fx.errors import warn_user
from oasis_fx.ranks import parse_auto_rank
from oasis_fx.runtime.subspaces.rules import Rule, rule_of


def rule_with(subspace: str | Rule, lr: float | str | None, every: int | None) -> str | Rule:
    """Return the rule with the settings that ``subspace_lr`` and ``subspace_every`` give it; None leaves its own.

    Raises:
        ValueError: the rule has no use for a setting, or it is out of range.
    """
    settings = {name: value for name, value in (("lr", lr), ("every", every)) if value is not None}
    if not settings:
        return subspace
    found = rule_of(subspace, **settings)
    new = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    old = " and ".join(f"subspace_{name}" for name in settings)
    _warn(old, f"subspace={type(found).__name__}({new}), with that rule of oasis_fx.rules,")
    return found


def rank_without_text(rank: Any) -> Any:
    """Return ``AutoRank(0.25)`` for ``"auto:0.25"``, and anything else as it is."""
    found = parse_auto_rank(rank) if isinstance(rank, str) else None
    if found is None:
        return rank
    _warn(f"rank={rank!r}", f"rank={found!r}")
    return found


def _warn(old: str, new: str) -> None:
    warn_user(f"{old}: write {new} since 0.3; the old form goes with the next release", DeprecationWarning)
