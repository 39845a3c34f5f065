"""The rules by which subspaces are chosen and move: one file each."""

from oasis_fx.runtime.rules.base import RULES, BatchRule, DrawnRule, Rule, StatisticRule, register, rule_of
from oasis_fx.runtime.rules.dct import DCT
from oasis_fx.runtime.rules.gradient_oja import GradientOja
from oasis_fx.runtime.rules.gradient_power import GradientPower
from oasis_fx.runtime.rules.gradient_svd import GradientSVD
from oasis_fx.runtime.rules.oja import Oja
from oasis_fx.runtime.rules.pca import PCA
from oasis_fx.runtime.rules.principal_random import PrincipalRandom
from oasis_fx.runtime.rules.random import Random
from oasis_fx.runtime.rules.sampled import Sampled

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
