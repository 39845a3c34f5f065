"""A basis from each batch itself, which nothing outlives.

    U = qf(X^T X[:, idx]),  idx: r random columns;   kept: X U and U;   dW = (dY^T X U) U^T, at full size

One step of subspace iteration from random coordinate vectors. The gradient leaves the graph dense, so any optimizer
takes it, with states at full size: what is saved is activation memory and time.

Source: LoRAct, arXiv 2509.23472, for N > n (its usual case); idx comes from torch's generator, as dropout does, so
that a run repeats itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from oasis_fx.runtime.subspaces.rules.base import BatchRule

if TYPE_CHECKING:
    from oasis_fx.runtime.subspaces.subspace import Subspace


@dataclass(frozen=True)
class Sampled(BatchRule):
    """LoRAct: a basis of each batch itself. It takes no settings."""

    name: ClassVar[str] = "sampled"
    every: ClassVar[int] = 1  # type: ignore[misc]  # no setting here
    dense: ClassVar[bool] = True
    each_batch: ClassVar[bool] = True

    def choose(self, batch: torch.Tensor, subspace: Subspace, generator: torch.Generator) -> torch.Tensor:
        n, r = subspace.shape
        columns = torch.randperm(n, generator=generator, device="cpu")[:r].to(batch.device)
        drawn = batch[:, columns]
        if drawn.numel():  # X^T X of large entries could leave the exponent range; only its columns' span counts
            drawn = drawn / drawn.abs().amax().clamp_min(torch.finfo(batch.dtype).tiny)
        return torch.linalg.qr(batch.mT @ drawn).Q
