"""The settings of a rule: on its instance, checked there, and part of what tells subspaces apart."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from oasis_fx.runtime.subspaces.rules import (
    DCT,
    PCA,
    RULES,
    GradientOja,
    GradientPower,
    GradientSVD,
    Oja,
    PrincipalRandom,
    Random,
    Sampled,
    StatisticRule,
    rule_of,
)
from oasis_fx.runtime.subspaces.spec import SubspaceSpec


@dataclass(frozen=True)
class FromBefore(StatisticRule):
    """As rules were written for 0.2."""

    name: ClassVar[str] = "from_before"
    every: ClassVar[int] = 20
    share: float = 0.5


class Undecorated(PCA):
    name = "undecorated"
    dense = True
    every = 7


@dataclass(frozen=True)
class EachBatch(DCT):
    name: ClassVar[str] = "each_batch"
    dense: ClassVar[bool] = True
    each_batch: ClassVar[bool] = True


def test_a_name_is_the_instance_with_its_defaults() -> None:
    assert SubspaceSpec(3) == SubspaceSpec(3, Oja()) == SubspaceSpec(3, Oja(lr=1.0, every=1))
    periods = {name: rule.every for name, rule in RULES.items()}
    expected = {"oja": 1, "pca": 200, "random": 50, "principal_random": 500, "sampled": 1, "gradient_svd": 200,
                "gradient_oja": 1, "gradient_power": 1, "dct": 1}  # fmt: skip
    assert {name: periods[name] for name in expected} == expected


@pytest.mark.parametrize(
    "rule", [Oja(every=2), Oja(lr=0.5), Oja(lr="auto"), Random(every=2), GradientPower(every=2), DCT(every=2)], ids=str
)
def test_settings_tell_subspaces_apart_and_outlive_a_copy(rule) -> None:
    default = SubspaceSpec(3, type(rule)())
    assert SubspaceSpec(3, rule) != default and len({SubspaceSpec(3, rule), default}) == 2
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == replace(rule) == rule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PCA(lr=0.5), "lr is 0.5, but the rule 'pca' has no use for it: it takes every"),
        (lambda: Sampled(every=2), "every is 2, but the rule 'sampled' has no use for it: it takes no settings"),
        (lambda: EachBatch(every=2), "every is 2, but the rule 'each_batch' has no use for it: it takes side"),
        (lambda: rule_of("random", lr=1.0), "lr is 1.0, but the rule 'random' has no use for it: it takes every"),
        (lambda: rule_of("sampled", every=2), "'sampled' has no use for it"),
        (lambda: GradientPower(share=0.5), "'gradient_power' has no use for it: it takes every, rho, error_feedback"),
        (lambda: Oja(lr=0), "lr is 0: it must be a number over 0"),
        (lambda: GradientOja(lr=math.nan), "lr is nan"),
        (lambda: Oja(lr="fast"), "lr is 'fast'.*or 'auto'"),
        (lambda: GradientSVD(every=0), "every is 0: it must be a whole number from 1"),
        (lambda: PrincipalRandom(every=2.0), r"every is 2\.0"),
        (lambda: DCT("gradient", every=True), "every is True"),
    ],
)
def test_what_a_rule_does_not_take_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_of_before_takes_settings_too() -> None:
    assert (FromBefore().every, FromBefore(every=3).every, FromBefore(0.25).share) == (20, 3, 0.25)
    assert rule_of(FromBefore(0.25), every=3, lr=2.0) == FromBefore(0.25, every=3, lr=2.0) != FromBefore(0.25, every=3)


def test_a_rule_without_the_decorator_takes_settings_too() -> None:
    assert (Undecorated().every, Undecorated(every=3).every, PCA().every) == (7, 3, 200)
    assert rule_of(Undecorated(), every=3) == Undecorated(every=3)


def test_a_rule_that_takes_no_period_can_be_changed_otherwise() -> None:
    assert replace(EachBatch(), side="gradient") == EachBatch("gradient")


def test_the_old_name_of_a_step_size() -> None:
    with pytest.warns(DeprecationWarning, match="learning_rate is called lr"):

        class Slow(Oja):
            name = "slow"
            learning_rate = 0.1

    assert Slow().lr == 0.1 and Slow(lr=0.2).lr == 0.2
