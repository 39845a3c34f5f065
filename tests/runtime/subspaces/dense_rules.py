"""Each kind of rule in a form that leaves gradients dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from oasis_fx.runtime.subspaces.rules import (
    DCT,
    PCA,
    GradientOja,
    GradientPower,
    GradientSVD,
    Oja,
    PrincipalRandom,
    Random,
)

RANK = 3


@dataclass(frozen=True)
class DenseOja(Oja):
    name: ClassVar[str] = "dense_oja"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DensePCA(PCA):
    name: ClassVar[str] = "dense_pca"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class EachPCA(PCA):
    name: ClassVar[str] = "each_pca"
    dense: ClassVar[bool] = True
    each_batch: ClassVar[bool] = True


@dataclass(frozen=True)
class EachDCT(DCT):
    name: ClassVar[str] = "each_dct"
    dense: ClassVar[bool] = True
    each_batch: ClassVar[bool] = True


@dataclass(frozen=True)
class DenseDCT(DCT):
    name: ClassVar[str] = "dense_dct"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DensePrincipalRandom(PrincipalRandom):
    name: ClassVar[str] = "dense_principal_random"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DenseRandom(Random):
    name: ClassVar[str] = "dense_random"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DenseGradientOja(GradientOja):
    name: ClassVar[str] = "dense_gradient_oja"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DenseGradientSVD(GradientSVD):
    name: ClassVar[str] = "dense_gradient_svd"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DenseGradientPower(GradientPower):
    name: ClassVar[str] = "dense_gradient_power"
    dense: ClassVar[bool] = True


KEPT = [DenseOja(), DensePCA(), DenseDCT(), DensePrincipalRandom(), DenseRandom(),
        DenseGradientOja(), DenseGradientSVD(), DenseGradientPower(), DenseDCT("gradient")]  # fmt: skip
EACH_BATCH = ["sampled", EachPCA()]
