"""Rules as tests ask for them."""

from __future__ import annotations

from oasis_fx.runtime.subspaces.rules import Rule, rule_of


def moving_every(rule: str | Rule, steps: int) -> Rule:
    """Return the rule with that period; `Sampled` takes none."""
    return rule_of(rule) if rule == "sampled" else rule_of(rule, every=steps)
