"""The Oja step of OASIS: how bases follow their activations.

    Q+ = orth(Q + eta * C / s),   C = X^T X Q [n, r],   s = ||C||_F / sqrt(r)

The scale s makes eta free of units. The first step of a basis, from its random start, is a power step (eta
towards infinity): with the random start it is a randomized range finder, so from the second step on the basis
is that of the data.

Source: OASIS, arXiv 2604.09406, whose body we do not have; the scale and the first step are ours (docs/design.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from oasis_fx.runtime.subspaces.rules.base import StatisticRule


@dataclass(frozen=True)
class Oja(StatisticRule):
    """OASIS: one step of Oja's rule on the activation.

    Args:
        lr: eta, over 0, in units of the statistic's mean singular value; 1 by default. From 100 on, and for
            ``math.inf``, it is power iteration, and ``"auto"`` finds the step size during training.
        every: optimizer steps between two moves of a basis, from 1 (the default). The first step moves it.

    Raises:
        ValueError: ``lr`` or ``every`` is out of range.
    """

    name: ClassVar[str] = "oja"

    def step(
        self, basis: torch.Tensor, statistic: torch.Tensor, energy: torch.Tensor, rate: torch.Tensor
    ) -> torch.Tensor:
        scale = torch.linalg.vector_norm(statistic, dim=(-2, -1), keepdim=True) / math.sqrt(basis.shape[-1])
        return basis + rate * statistic / scale.clamp_min(torch.finfo(basis.dtype).tiny)
