"""Periodic PCA of the activation, the alternative that the paper of OASIS compares itself with.

    every K steps   Q+ = the r top right singular vectors of X [N, n], the first batch of the step

No mean is taken off: what has to be kept is X, not its variance.

Source: the ablation of OASIS, arXiv 2604.09406 ("periodic PCA"); its K is not known to us.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from oasis_fx.runtime.subspaces.rules.base import BatchRule
from oasis_fx.runtime.subspaces.rules.singular_vectors import top_right_singular_vectors

if TYPE_CHECKING:
    from oasis_fx.runtime.subspaces.subspace import Subspace


@dataclass(frozen=True)
class PCA(BatchRule):
    """Periodic PCA of the activation: the top right singular vectors of a batch.

    Args:
        every: K, optimizer steps between two moves of a basis, from 1.

    Raises:
        ValueError: ``every`` is not such a number.
    """

    name: ClassVar[str] = "pca"

    every: int = field(default=200, kw_only=True)

    def choose(self, batch: torch.Tensor, subspace: Subspace, generator: torch.Generator) -> torch.Tensor:
        return top_right_singular_vectors(batch, subspace.shape[1])
