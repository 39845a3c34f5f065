"""The rules by which subspaces are chosen and move: one file each."""

from oasis_fx.runtime.subspaces.rules.base import BatchRule, DrawnRule, Rule, StatisticRule
from oasis_fx.runtime.subspaces.rules.dct import DCT
from oasis_fx.runtime.subspaces.rules.gradient_oja import GradientOja
from oasis_fx.runtime.subspaces.rules.gradient_power import GradientPower
from oasis_fx.runtime.subspaces.rules.gradient_svd import GradientSVD
from oasis_fx.runtime.subspaces.rules.oja import Oja
from oasis_fx.runtime.subspaces.rules.pca import PCA
from oasis_fx.runtime.subspaces.rules.principal_random import PrincipalRandom
from oasis_fx.runtime.subspaces.rules.random import Random
from oasis_fx.runtime.subspaces.rules.registry import RULES, register, rule_of
from oasis_fx.runtime.subspaces.rules.sampled import Sampled

__all__ = [
    "DCT",
    "PCA",
    "RULES",
    "BatchRule",
    "DrawnRule",
    "GradientOja",
    "GradientPower",
    "GradientSVD",
    "Oja",
    "PrincipalRandom",
    "Random",
    "Rule",
    "Sampled",
    "StatisticRule",
    "register",
    "rule_of",
]

for _rule in (
    Oja(),
    PCA(),
    Random(),
    PrincipalRandom(),
    Sampled(),
    GradientSVD(),
    GradientOja(),
    GradientPower(),
    DCT(),
):
    register(_rule)
