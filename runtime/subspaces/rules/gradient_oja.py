"""One step of online PCA on each weight gradient.

    L(Q) = ||A Q Q^T - A||^2,  A = dW / ||dW||;   at Q^T Q = I:  grad L = -2 (I - Q Q^T) A^T A Q
    Q+ = orth(Q + 2 eta (I - Q Q^T) C / ||dW||^2),   C = dW^T dW Q

Where the paper bounds ||Q^T Q - I|| by a penalty, or leaves it, we orthonormalise: norms of low-rank gradients stay
exact, and the penalty is zero. Moments are not carried over: the paper proves convergence without. Over several
backward passes of a step C is the sum of theirs. The first step, from the random start, is a power step; the paper
starts from an SVD.

Source: Online Subspace Descent, arXiv 2408.12857, with plain gradient descent on Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from oasis_fx.runtime.subspaces.rules.base import Side, StatisticRule


@dataclass(frozen=True)
class GradientOja(StatisticRule):
    """Online Subspace Descent: one step of online PCA on the weight gradient.

    Args:
        lr: eta, over 0; 1 by default. ``"auto"`` finds the step size during training.
        every: optimizer steps between two moves of a basis, from 1 (the default). The first step moves it.

    Raises:
        ValueError: ``lr`` or ``every`` is out of range.
    """

    name: ClassVar[str] = "gradient_oja"
    transports: ClassVar[bool] = False
    needs_energy: ClassVar[bool] = True

    @property
    def on(self) -> Side:
        return "gradient"

    def step(
        self, basis: torch.Tensor, statistic: torch.Tensor, energy: torch.Tensor, rate: torch.Tensor
    ) -> torch.Tensor:
        direction = statistic - basis @ (basis.mT @ statistic)
        return basis + 2 * rate * direction / energy.clamp_min(torch.finfo(basis.dtype).tiny)
