"""The first moment of a weight, which its optimizer lends to rules that choose a basis by it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


def bias_correction(beta: float, step: torch.Tensor) -> torch.Tensor:
    """Return ``1 - beta^step``, float64 in the shape of ``step``: in float32, 1 - 0.999 has only four right digits."""
    return 1 - beta ** step.double()


@dataclass(frozen=True)
class Momentum:
    """The first moment of the one weight of a subspace, as its optimizer keeps it.

    Attributes:
        mean: m [rows, r], in the present coordinates of the basis, not bias-corrected. It is the optimizer's own
            tensor, and changes with every step.
        step: the optimizer's count of steps, a scalar.
        beta: the decay of m at each step.
    """

    mean: torch.Tensor
    step: torch.Tensor
    beta: float

    def corrected(self) -> torch.Tensor:
        """Return the bias-corrected mean m^ [rows, r]; before the first step, zeros."""
        bias = bias_correction(self.beta, self.step)
        return self.mean / torch.where(bias > 0, bias, 1.0).to(self.mean)

    def to(self, device: torch.device, dtype: torch.dtype) -> Momentum:
        """Return the moment on another device and in another dtype; from the next step, the optimizer lends its own."""
        mean = self.mean.to(device, dtype if self.mean.is_floating_point() else self.mean.dtype)
        return replace(self, mean=mean, step=self.step.to(device))
