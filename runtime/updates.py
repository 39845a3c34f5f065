"""What a step of an optimizer works on: weights, their gradients, their states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from oasis_fx.runtime.layout import Features
from oasis_fx.runtime.low_rank_grad import LowRankGrad

State = dict[str, Any]


@dataclass(frozen=True)
class LowRankUpdate:
    """One weight's share of a step: its gradient in the coordinates of a basis, and its state.

    Attributes:
        factor: G [m, r].
        basis: Q [n, r], ``orthonormal`` or not.
        dense: dW, in the weight's shape, of which the factor was made here; None where the gradient came as one.
    """

    weight: torch.Tensor
    factor: torch.Tensor
    basis: torch.Tensor
    features: Features
    state: State
    orthonormal: bool = True
    dense: torch.Tensor | None = None

    @property
    def rank_scale(self) -> float:
        """What makes a step U Q^T as long as one of n coordinates: sqrt(n) / ||Q||_F.

        Of bases that are not orthonormal, `random`'s has norm sqrt(n); others are taken to have it.
        """
        n, r = self.basis.shape
        return math.sqrt(n / r) if self.orthonormal else 1.0


@dataclass(frozen=True)
class DenseUpdate:
    """The same for a weight whose states have its own shape."""

    weight: torch.Tensor
    gradient: torch.Tensor
    state: State


def is_low_rank(state: State) -> bool:
    """Whether the states of a weight are in the coordinates of a basis."""
    return "features" in state and not state.get("full_rank", False)


def all_finite(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Whether every gradient is finite, as a bool scalar on the first one's device; nothing waits for it."""
    by_kind: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        values = gradient.factor if isinstance(gradient, LowRankGrad) else gradient
        by_kind.setdefault((values.device, values.dtype), []).append(values)
    verdicts: list[torch.Tensor] = []
    for (_, dtype), batch in by_kind.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32  # a float16 norm could overflow
        verdicts.append(torch.stack(list(torch._foreach_norm(batch, 2, dtype=wide))).isfinite().all())
    return torch.stack([verdict.to(verdicts[0].device) for verdict in verdicts]).all()
