"""Find rules by their names, and refuse those whose class attributes contradict each other."""

from __future__ import annotations

from typing import Any

from oasis_fx.runtime.subspaces.rules.base import BatchRule, DrawnRule, Rule, StatisticRule
from oasis_fx.runtime.subspaces.rules.settings import check_settings, settings_of

RULES: dict[str, Rule] = {}


def register(rule: Rule) -> Rule:
    """Make a rule known by its name, so that ``subspace="name"`` finds it, and return it.

    Raises:
        ValueError: another rule has the name, it derives from none of the three classes, or its class attributes
            contradict each other.
    """
    _check(rule)
    if type(RULES.get(rule.name, rule)) is not type(rule):
        raise ValueError(f"a rule named {rule.name!r} exists: {RULES[rule.name]!r}")
    RULES[rule.name] = rule
    return rule


def rule_of(given: str | Rule, **settings: Any) -> Rule:
    """Return the rule that a name or an instance stands for.

    Args:
        given: the name of a rule, which stands for the rule with its defaults, or a rule.
        settings: settings that replace those of the rule: ``rule_of("oja", every=10)`` is ``Oja(every=10)``. None
            leaves the rule's own.

    Raises:
        ValueError: no rule has that name (the message lists those known), the rule has no use for a setting, a setting
            is out of range, or the class attributes of the rule contradict each other.
    """
    if not isinstance(given, Rule) and (not isinstance(given, str) or given not in RULES):
        raise ValueError(f"subspace is {given!r}: it must be one of {', '.join(map(repr, RULES))}, or a rule")
    rule = given if isinstance(given, Rule) else RULES[given]
    given_ones = {name: value for name, value in settings.items() if value is not None}
    if given_ones:
        kept = {name: getattr(rule, name) for name in settings_of(type(rule))}
        rule = type(rule)(**kept | given_ones)
    _check(rule)
    return rule


def _check(rule: object) -> None:
    if not isinstance(rule, StatisticRule | BatchRule | DrawnRule):
        raise ValueError(f"rule is {rule!r}: it must derive from StatisticRule, BatchRule or DrawnRule")
    if rule.on not in ("activation", "gradient"):
        raise ValueError(f"rule {rule.name!r} has on = {rule.on!r}: it must be 'activation' or 'gradient'")
    if isinstance(rule, BatchRule) and rule.each_batch and not rule.dense:
        raise ValueError(
            f"rule {rule.name!r} has each_batch = True and dense = False: a factor in a basis that is gone could not "
            "be read. Set dense = True, or let the basis outlive its batch"
        )
    if isinstance(rule, StatisticRule) and rule.coded:
        raise ValueError(
            f"rule {rule.name!r} is a StatisticRule with coded = True: its basis moves by C and is stored. "
            "Derive from BatchRule or DrawnRule"
        )
    if isinstance(rule, DrawnRule) and not rule.coded:
        raise ValueError(f"rule {rule.name!r} is a DrawnRule with coded = False: its basis is made from its code alone")
    check_settings(rule)  # a class may have a __post_init__ of its own
