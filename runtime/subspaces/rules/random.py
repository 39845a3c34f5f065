"""Random projections of activations, drawn from a seed and not stored.

    Q ~ N(0, 1/r) [n, r], so that E[Q Q^T] = I;   G = dY^T X Q;   W = W - lr U Q^T;   a new Q every T steps

Q is not orthonormal, and moments are not carried over. Scaling the update (CompAct's alpha = 0.25) is left to the
learning rate.

Source: CompAct, arXiv 2410.15352: T = 50 (200 for its largest model), one seed a layer; here one an activation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from oasis_fx.runtime.subspaces.rules.base import DrawnRule
from oasis_fx.runtime.subspaces.seeds import generator_of


@dataclass(frozen=True)
class Random(DrawnRule):
    """CompAct: a Gaussian basis, drawn anew every T steps. Its code is (seed, number of the drawing).

    Args:
        every: T, optimizer steps between two drawings, from 1.

    Raises:
        ValueError: ``every`` is not such a number.
    """

    name: ClassVar[str] = "random"
    transports: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    every: int = field(default=50, kw_only=True)

    def first_code(self, r: int, seed: int) -> torch.Tensor:
        return torch.tensor([seed, 0], device="cpu")

    def next_code(self, code: torch.Tensor) -> torch.Tensor:
        return code + torch.tensor([0, 1], device="cpu")

    def expand(self, code: torch.Tensor, n: int, r: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        seed, drawing = code.tolist()
        # On the CPU whatever the device: equal on all ranks, and after a move of the model.
        drawn = torch.randn(n, r, generator=generator_of(seed, drawing), dtype=torch.float32, device="cpu") / r**0.5
        return drawn.to(device=device, dtype=dtype)
