"""What a step of an optimizer works on: weights, their gradients, their states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from oasis_fx.graph.matricization import Features
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.subspaces import host_reads

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
    """Whether every gradient is finite, as a bool scalar on the first one's device; nothing waits for it.

    By the largest entry of each: unlike a sum of squares it is finite wherever all entries are, and NaN where one is.
    """
    by_kind: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        values = gradient.factor if isinstance(gradient, LowRankGrad) else gradient
        if values.numel():
            by_kind.setdefault((values.device, values.dtype), []).append(real_view(values))
    verdicts = [_are_finite(batch) for batch in by_kind.values()]
    device = gradients[0].device
    if not verdicts:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.stack([verdict.to(device) for verdict in verdicts]).all()


def _are_finite(batch: list[torch.Tensor]) -> torch.Tensor:
    if host_reads.reads_are_free(batch[0].device):
        quick = torch.stack(list(torch._foreach_norm(batch))).isfinite().all()
        if quick:  # where a sum of squares overflows, the largest entries decide
            return quick
    return torch.stack(list(torch._foreach_norm(batch, math.inf))).isfinite().all()


def in_wide_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the dtype that updates are computed in: float32 at least, float64 and complex as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def real_view(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of real numbers, which is how torch's optimizers take one; any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real_update(update: DenseUpdate) -> DenseUpdate:
    """The update of a complex weight as that of a real one, which lies in the same memory; any other as it is."""
    if not update.weight.is_complex():
        return update
    state = {key: real_view(value) if isinstance(value, torch.Tensor) else value for key, value in update.state.items()}
    return DenseUpdate(real_view(update.weight), real_view(update.gradient), state)
