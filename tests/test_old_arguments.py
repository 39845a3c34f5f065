"""Arguments of 0.2: each works for one release, and warns with the new form."""

from __future__ import annotations

import math

import pytest

from oasis_fx import AutoRank, oasis_backend
from oasis_fx.runtime.subspaces.rules import PCA, GradientPower, Oja, Rule


@pytest.mark.parametrize(
    ("arguments", "expected", "message"),
    [
        ({"subspace_lr": 0.5}, Oja(lr=0.5), r"subspace_lr: write subspace=Oja\(lr=0.5\)"),
        (
            {"subspace_lr": math.inf, "subspace_every": 3},
            Oja(lr=math.inf, every=3),
            r"write subspace=Oja\(lr=inf, every",
        ),
        ({"subspace": "pca", "subspace_every": 50}, PCA(every=50), r"subspace_every: write subspace=PCA\(every=50\)"),
        (
            {"subspace": GradientPower(0.5), "subspace_every": 2},
            GradientPower(0.5, every=2),
            r"GradientPower\(every=2\)",
        ),
    ],
    ids=str,
)
def test_settings_of_a_rule(arguments: dict, expected: Rule, message: str) -> None:
    with pytest.warns(DeprecationWarning, match=message) as caught:
        backend = oasis_backend(4, **arguments)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert backend.settings == oasis_backend(4, subspace=expected).settings


def test_a_budget_of_ranks() -> None:
    with pytest.warns(DeprecationWarning, match=r"rank='auto:0.25': write rank=AutoRank\(share=0.25\)"):
        backend = oasis_backend("auto:0.25")
    assert backend.settings == oasis_backend(AutoRank(0.25)).settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subspace_lr": 0}, "lr is 0: it must be a number over 0"),
        ({"subspace_every": 2.0}, r"every is 2\.0: it must be a whole number from 1"),
        ({"subspace": "pca", "subspace_lr": 0.5}, "lr is 0.5, but the rule 'pca' has no use for it: it takes every"),
        ({"subspace": "sampled", "subspace_every": 2}, "the rule 'sampled' has no use for it: it takes no settings"),
    ],
    ids=str,
)
def test_what_a_rule_has_no_use_for_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oasis_backend(4, **arguments)
