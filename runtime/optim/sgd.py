"""OasisSGD: gradient descent with momentum, the momentum in the subspaces of the weights.

    m = mu m + G;   U = m, or G + mu m with Nesterov's;   W = (1 - lr wd) W - lr U Q^T

Source: torch.optim.SGD without dampening, but with decoupled weight decay (SGDW, arXiv 1711.05101): decay within the
gradient would not stay in the subspace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from oasis_fx.runtime.optim.base import SubspaceOptimizer
from oasis_fx.runtime.optim.group_settings import (
    check_flags,
    check_momentum,
    check_numbers,
    check_rounding,
    rounds_stochastically,
)
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate
from oasis_fx.runtime.optim.weight_steps import step_dense_weight, step_weight, where


@dataclass(frozen=True)
class Hyper:
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    stochastic_rounding: bool


class OasisSGD(SubspaceOptimizer):
    """SGD with momentum for models compiled with `oasis_backend`.

    Args:
        params: as for `OasisAdamW`.
        lr: learning rate, from 0; a float or a one-element tensor.
        momentum: its decay a step, in [0, 1).
        weight_decay: decoupled, from 0.
        nesterov: look ahead by one step of the momentum.
        stochastic_rounding: as for `OasisAdamW`.

    Raises:
        ValueError: naming the value and what is allowed.
    """

    states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    mean_state: ClassVar[str | None] = None  # a sum of gradients, not a mean

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        stochastic_rounding: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def check_group(self, group: Mapping[str, Any]) -> None:
        check_numbers(group, "lr", "weight_decay")
        check_momentum(group)
        check_rounding(group)
        check_flags(group, "nesterov")

    def hyper_of(self, group: Mapping[str, Any], weight: torch.Tensor) -> Hyper:
        return Hyper(
            float(group["lr"]),
            float(group["momentum"]),
            float(group["weight_decay"]),
            bool(group["nesterov"]),
            rounds_stochastically(group, weight),
        )

    def step_low_rank(
        self, updates: Sequence[LowRankUpdate], hyper: Hyper, gate: torch.Tensor | None, generator: torch.Generator
    ) -> None:
        for update in updates:
            minus_u = self._advance(update.state["momentum_buffer"], update.factor, hyper, gate)
            step_weight(update, minus_u, hyper, gate, generator)
            update.state["step"] += where(gate, torch.ones_like(update.state["step"]))

    def step_dense(
        self, updates: Sequence[DenseUpdate], hyper: Hyper, gate: torch.Tensor | None, generator: torch.Generator
    ) -> None:
        for update in updates:
            minus_u = self._advance(update.state["momentum_buffer"], update.gradient, hyper, gate)
            step_dense_weight(update.weight, minus_u, hyper, gate, generator)
            update.state["step"] += where(gate, torch.ones_like(update.state["step"]))

    def _advance(
        self, momentum: torch.Tensor, gradient: torch.Tensor, hyper: Hyper, gate: torch.Tensor | None
    ) -> torch.Tensor:
        """Update the momentum in place; return -U, in float32 at least."""
        g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        new = hyper.momentum * momentum.to(g.dtype) + g
        momentum.copy_(new if gate is None else torch.where(gate, new, momentum.to(g.dtype)))
        return where(gate, -(g + hyper.momentum * new) if hyper.nesterov else -new)
