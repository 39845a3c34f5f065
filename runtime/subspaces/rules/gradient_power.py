"""One block power iteration on each weight gradient, averaged with the first moment.

    A = dW + E;   B = rho m^ Q^T + (1 - rho) A;   Q+ = qf(B^T B Q), at first the top singular vectors of A;   G = A Q+

m^ is the bias-corrected first moment in the coordinates of Q. With ``error_feedback``, E [m, n] of the next step is
what the projections of gradient and moment have lost:

    E+ = A - G Q+^T + b1 / (1 - b1) * (m Q^T - m R Q+^T),   R = Q^T Q+

E costs as much as a gradient of full size, float32, for each weight. Without it E = 0.

Source: LDAdam, arXiv 2410.16103, its equations in the right-hand form; rho = b1 = 0.908 there. Over several backward
passes of a step the first one's gradient chooses the basis. An optimizer without a mean of gradients (SGD, Muon) has no
m^ to give: B = A then. A batch that is thrown away takes the error that it took up with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from oasis_fx.runtime.subspaces.orthonormalize import orthonormalize
from oasis_fx.runtime.subspaces.rules.base import BatchRule, Side
from oasis_fx.runtime.subspaces.rules.singular_vectors import top_right_singular_vectors

if TYPE_CHECKING:
    from oasis_fx.runtime.subspaces.subspace import Subspace


@dataclass(frozen=True)
class GradientPower(BatchRule):
    """LDAdam: one block power iteration on the gradient, averaged with the first moment.

    Args:
        rho: share of the moment in B, from 0 and under 1.
        error_feedback: keep what the projection loses for the next step: float32, the size of the weight.
        every: optimizer steps between two moves of a basis, from 1 (the default).

    Raises:
        ValueError: ``rho`` or ``every`` is out of range.
    """

    rho: float = 0.908
    error_feedback: bool = False

    name: ClassVar[str] = "gradient_power"
    uses_momentum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho is {self.rho!r}: it must be a number from 0 and under 1")

    @property
    def on(self) -> Side:
        return "gradient"

    def choose(self, batch: torch.Tensor, subspace: Subspace, generator: torch.Generator) -> torch.Tensor:
        a = batch if subspace.error is None else batch + subspace.error
        if int(subspace.num_updates) == 0:
            return top_right_singular_vectors(a, subspace.shape[1])
        q = subspace.basis.detach()
        if subspace.momentum is None:
            b_q = a @ q
            return orthonormalize((a.mT @ b_q)[None])[0]
        mean = subspace.momentum.corrected()
        b_q = self.rho * mean + (1 - self.rho) * (a @ q)
        return orthonormalize((self.rho * q @ (mean.mT @ b_q) + (1 - self.rho) * (a.mT @ b_q))[None])[0]

    def project_gradient(self, gradient: torch.Tensor, subspace: Subspace, old: torch.Tensor | None) -> torch.Tensor:
        q = subspace.basis.detach()
        if not self.error_feedback or not bool(gradient.isfinite().all()):  # E would never be finite again
            return gradient @ q
        kept = torch.zeros_like(gradient) if subspace.error is None else subspace.error
        if old is not None:  # the first backward pass of the step takes up what is left of the one before
            a, kept = gradient + kept, torch.zeros_like(gradient)
            momentum = subspace.momentum
            if momentum is not None:
                mean, b1 = momentum.mean, momentum.beta
                kept += b1 / (1 - b1) * (mean @ old.mT - mean @ (old.mT @ q) @ q.mT)
        else:
            a = gradient
        g = a @ q
        subspace.error = kept + a - g @ q.mT
        return g
