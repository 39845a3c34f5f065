"""The settings of rules: which a rule takes, their defaults, and what is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import Field, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oasis_fx.runtime.subspaces.rules.base import Rule


def settings_of(rule: type[Rule]) -> tuple[str, ...]:
    """Return the names of the settings that a class of rules takes."""
    found = tuple(entry.name for entry in fields(rule) if entry.init)
    return tuple(name for name in found if name != "every" or not getattr(rule, "each_batch", False))


def declare_defaults(rule: type[Rule]) -> None:
    """Make ``every`` and ``lr`` in the body of a class, annotated as a `ClassVar` or not at all, keyword-only fields.

    Before 0.3 they were class attributes, and ``lr`` was called ``learning_rate``.
    """
    if "learning_rate" in vars(rule):
        warnings.warn(
            f"{rule.__qualname__}.learning_rate is called lr since 0.3: the old name goes with the next release",
            DeprecationWarning,
            stacklevel=4,
        )
        rule.lr = vars(rule)["learning_rate"]  # type: ignore[attr-defined]
        rule.__annotations__.pop("learning_rate", None)
    for name in ("every", "lr"):
        if name in vars(rule) and not isinstance(vars(rule)[name], Field) and not _has_no_use_for(rule, name):
            rule.__annotations__[name] = int if name == "every" else float | str
            setattr(rule, name, field(default=vars(rule)[name], kw_only=True))


def refuse_unknown(rule: type[Rule], settings: Mapping[str, Any]) -> None:
    """Refuse settings that a class of rules has no use for.

    Raises:
        ValueError: naming the setting, the rule, and what the rule takes.
    """
    known = settings_of(rule)
    for name, value in settings.items():
        if name in known or (_has_no_use_for(rule, name) and _is_default(rule, name, value)):
            continue
        takes = f"it takes {', '.join(known)}" if known else "it takes no settings"
        raise ValueError(
            f"{name} is {value!r}, but the rule {getattr(rule, 'name', rule.__qualname__)!r} has no use for it: {takes}"
        )


def check_settings(rule: Rule) -> None:
    """Check the settings that rules have in common.

    Raises:
        ValueError: naming the setting, its value, and what is allowed.
    """
    every, lr = rule.every, getattr(rule, "lr", 1.0)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is {every!r}: it must be a whole number from 1")
    number = isinstance(lr, int | float) and not isinstance(lr, bool) and not math.isnan(lr)
    if lr != "auto" and not (number and lr > 0):
        raise ValueError(f"lr is {lr!r}: it must be a number over 0 (math.inf: power iteration), or 'auto'")


def _has_no_use_for(rule: type[Rule], name: str) -> bool:
    return name == "every" and getattr(rule, "each_batch", False)


def _is_default(rule: type[Rule], name: str, value: Any) -> bool:
    """Return whether a value is the default of a setting, which `dataclasses.replace` passes on as if it were given."""
    return any(entry.name == name and entry.init and entry.default == value for entry in fields(rule))
