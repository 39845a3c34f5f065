"""The parts of an optimizer step: weights with their gradients and states, and whether all gradients are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oasis_fx.graph.matricization import Features
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.subspaces import host_reads

State = dict[str, Any]


@dataclass(slots=True, eq=False)  # frozen, it would take three times as long to make one
class LowRankUpdate:
    """One weight's share of a step whose gradient and states are in the coordinates of a basis.

    Attributes:
        weight: the parameter, or its local part where it is sharded; stepped in place.
        factor: G [m, r].
        basis: Q [n, r].
        features: which dimensions of the weight are n.
        state: of the weight, changed in place.
        orthonormal: whether ``Q^T Q = I``.
        dense: dW, in the weight's shape, where the optimizer made the factor from it; None where the gradient came as
            a factor.
        tail: T [n, t], the columns beside the basis that no state follows; None where there are none.
        tail_factor: dW T [m, t]; None likewise.
    """

    weight: torch.Tensor
    factor: torch.Tensor
    basis: torch.Tensor
    features: Features
    state: State
    orthonormal: bool = True
    dense: torch.Tensor | None = None
    tail: torch.Tensor | None = None
    tail_factor: torch.Tensor | None = None

    @property
    def rank_scale(self) -> float:
        """The factor sqrt(n) / ||Q||_F, by which a step U Q^T becomes as long as one in all n coordinates.

        A basis that is not orthonormal is taken to have the norm sqrt(n), as those of `Random` do.
        """
        n, r = self.basis.shape
        return math.sqrt(n / r) if self.orthonormal else 1.0


@dataclass(slots=True, eq=False)
class DenseUpdate:
    """One weight's share of a step whose gradient and states have the weight's own shape."""

    weight: torch.Tensor
    gradient: torch.Tensor
    state: State


def states_of(updates: Sequence[Any]) -> list[State]:
    """Return the state of each update."""
    return [update.state for update in updates]


def rank_scales(updates: Sequence[LowRankUpdate]) -> list[float]:
    """Return `LowRankUpdate.rank_scale` of each update."""
    return [update.rank_scale for update in updates]


def is_low_rank(state: State) -> bool:
    """Return whether the states of a weight are in the coordinates of a basis."""
    return "features" in state and not state.get("full_rank", False)


def all_finite(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return a bool scalar, on the device of the first gradient: whether every gradient is finite.

    The largest entry of each decides: unlike a sum of squares, it is finite wherever all entries are, and NaN where one
    is. The host waits for no device.

    Args:
        gradients: at least one, of any devices and dtypes; of a low-rank gradient its factor is looked at.
    """
    by_kind: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        values = gradient.factor if isinstance(gradient, LowRankGrad) else gradient
        if values.numel():
            by_kind.setdefault((values.device, values.dtype), []).append(values)
    verdicts = [
        _are_finite([real_view(values) for values in batch] if dtype.is_complex else batch)
        for (_, dtype), batch in by_kind.items()
    ]
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
    """Return a complex tensor as a view of real pairs, [..., 2], as torch's optimizers do; any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real_update(update: DenseUpdate) -> DenseUpdate:
    """Return the update of a complex weight as one of real pairs in the same memory; any other as it is."""
    if not update.weight.is_complex():
        return update
    state = {key: real_view(value) if isinstance(value, torch.Tensor) else value for key, value in update.state.items()}
    return DenseUpdate(real_view(update.weight), real_view(update.gradient), state)
