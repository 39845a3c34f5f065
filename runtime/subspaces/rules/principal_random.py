"""A principal part of the activation and a random part of the rest: together unbiased.

    Q1 = the r1 top right singular vectors of X;   Q2 = qf((I - Q1 Q1^T) S),  S ~ N(0, 1) [n, r2]
    X~ = X Q1 Q1^T + k X Q2 Q2^T,   k = (n - r1) / r2,   E[X~] = X

The basis is Q = [Q1, Q2], orthonormal; the projection is X Q diag(1, .., 1, k, .., k), so that G Q^T is the paper's
weight gradient. The paper keeps optimizer states at full rank: `OasisAdamW(..., full_size_states=True)`.

Source: PRAC, arXiv 2602.23111: r1 = r2, refreshed every 500 steps in pretraining and 200 in fine-tuning.
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
class PrincipalRandom(BatchRule):
    """PRAC: a basis of a principal part of the activation and a random part of the rest.

    Args:
        principal: the share of the rank that is principal, over 0 and under 1.
        every: optimizer steps between two moves of a basis, from 1.

    Raises:
        ValueError: ``principal`` or ``every`` is out of range.
    """

    principal: float = 0.5
    every: int = field(default=500, kw_only=True)

    name: ClassVar[str] = "principal_random"
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.principal < 1:
            raise ValueError(f"principal is {self.principal!r}: it must be a share over 0 and under 1")

    @property
    def resizable(self) -> bool:
        return False  # its columns are of two kinds

    def parts(self, n: int, r: int) -> tuple[int, int]:
        """Return r1 and r2, the numbers of principal and of random columns.

        A rank of n is all principal, since nothing is left to draw from, and a rank of 1 is all random.
        """
        r1 = r if r == n else min(max(round(self.principal * r), 1), r - 1)
        return r1, r - r1

    def choose(self, batch: torch.Tensor, subspace: Subspace, generator: torch.Generator) -> torch.Tensor:
        n, r = subspace.shape
        r1, r2 = self.parts(n, r)
        q1 = top_right_singular_vectors(batch, r1) if r1 else batch.new_empty(n, 0)
        drawn = torch.randn(n, r2, generator=generator, dtype=torch.float32, device="cpu").to(batch)
        # Twice: what rounding leaves of Q1 in the first remainder is taken out of the second.
        rest = drawn - q1 @ (q1.mT @ drawn)
        return torch.cat([q1, torch.linalg.qr(rest - q1 @ (q1.mT @ rest)).Q], dim=1)

    def weights(self, n: int, r: int) -> torch.Tensor | None:
        r1, r2 = self.parts(n, r)
        return torch.tensor([1.0] * r1 + [(n - r1) / max(r2, 1)] * r2, device="cpu")
