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

from oasis_fx.runtime.optim import one_momentum
from oasis_fx.runtime.optim.base import SubspaceOptimizer
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.group_settings import (
    check_flags,
    check_momentum,
    check_numbers,
    check_rounding,
    learning_rate,
    rounds_stochastically,
)
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate


@dataclass(frozen=True)
class SGDSettings:
    """The settings of one parameter group at one step, for weights of one dtype."""

    lr: float | torch.Tensor
    momentum: float
    weight_decay: float
    nesterov: bool
    stochastic_rounding: bool
    rank_scaling: ClassVar[bool] = False  # a step of SGD is as long as its gradient


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

    def settings_of(self, group: Mapping[str, Any], dtype: torch.dtype) -> SGDSettings:
        return SGDSettings(
            learning_rate(group),
            float(group["momentum"]),
            float(group["weight_decay"]),
            bool(group["nesterov"]),
            rounds_stochastically(group, dtype),
        )

    def step_low_rank(self, updates: Sequence[LowRankUpdate], step: Step[SGDSettings]) -> None:
        one_momentum.step_low_rank(updates, "momentum_buffer", _formula(step.settings), step, None)

    def step_dense(self, updates: Sequence[DenseUpdate], step: Step[SGDSettings]) -> None:
        one_momentum.step_dense(updates, "momentum_buffer", _formula(step.settings), step)


def _formula(settings: SGDSettings) -> one_momentum.Formula:
    def step(m: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        new = settings.momentum * m + g
        return new, -(g + settings.momentum * new) if settings.nesterov else -new

    return step
