"""Periodic SVD of the weight gradient.

    every T steps   Q+ = the r top singular vectors of dW, on the smaller of its sides;   G = dW Q+

dW lives only inside the backward graph. Moments are kept as they are when the basis moves, and the update's factor
(GaLore's scale = 0.25) is left to the learning rate.

Source: GaLore, arXiv 2403.03507: T = 200.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from oasis_fx.runtime.subspaces.rules.base import BatchRule, Side
from oasis_fx.runtime.subspaces.rules.singular_vectors import top_right_singular_vectors

if TYPE_CHECKING:
    from oasis_fx.runtime.subspaces.subspace import Subspace


@dataclass(frozen=True)
class GradientSVD(BatchRule):
    """GaLore: the top right singular vectors of the weight gradient.

    Args:
        every: T, optimizer steps between two moves of a basis, from 1.

    Raises:
        ValueError: ``every`` is not such a number.
    """

    name: ClassVar[str] = "gradient_svd"
    transports: ClassVar[bool] = False

    every: int = field(default=200, kw_only=True)

    @property
    def on(self) -> Side:
        return "gradient"

    def choose(self, batch: torch.Tensor, subspace: Subspace, generator: torch.Generator) -> torch.Tensor:
        return top_right_singular_vectors(batch, subspace.shape[1])
