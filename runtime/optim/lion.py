"""OasisLion: Lion, its momentum in the subspaces of the weights.

    U = sign(b1 m + (1 - b1) G);   m = b2 m + (1 - b2) G;   W = (1 - lr wd) W - lr sqrt(n / r) U Q^T

Signs are taken of coordinates in the basis, so the update's size depends on the basis: ||U Q^T||_F = sqrt(m r) for
any orthonormal one. The factor makes it that of a dense step, as for `OasisAdamW`.

Source: Lion, arXiv 2302.06675; in a subspace, Online Subspace Descent, arXiv 2408.12857.
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
    check_decays,
    check_flags,
    check_numbers,
    check_rounding,
    learning_rate,
    rounds_stochastically,
)
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate


@dataclass(frozen=True)
class LionSettings:
    """The settings of one parameter group at one step, for weights of one dtype."""

    lr: float | torch.Tensor
    beta1: float
    beta2: float
    weight_decay: float
    stochastic_rounding: bool
    rank_scaling: bool


class OasisLion(SubspaceOptimizer):
    """Lion for models compiled with `oasis_backend`.

    Args:
        params: as for `OasisAdamW`.
        lr: learning rate, from 0; a float or a one-element tensor. A third to a tenth of AdamW's is usual.
        betas: weights of the momentum in the update, and its decay a step; each in [0, 1).
        weight_decay: decoupled, from 0.
        stochastic_rounding, rank_scaling: as for `OasisAdamW`.

    Raises:
        ValueError: naming the value and what is allowed.
    """

    states: ClassVar[tuple[str, ...]] = ("exp_avg",)
    mean_state: ClassVar[str | None] = "exp_avg"

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        stochastic_rounding: bool | None = None,
        rank_scaling: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "rank_scaling": rank_scaling,
        }
        super().__init__(params, defaults)

    def check_group(self, group: Mapping[str, Any]) -> None:
        check_numbers(group, "lr", "weight_decay")
        check_decays(group)
        check_rounding(group)
        check_flags(group, "rank_scaling")

    def settings_of(self, group: Mapping[str, Any], dtype: torch.dtype) -> LionSettings:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        rounding = rounds_stochastically(group, dtype)
        decay, scaling = float(group["weight_decay"]), bool(group.get("rank_scaling", False))
        return LionSettings(learning_rate(group), beta1, beta2, decay, rounding, scaling)

    def mean_decay(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][1])

    def step_low_rank(self, updates: Sequence[LowRankUpdate], step: Step[LionSettings]) -> None:
        scales = [update.rank_scale for update in updates] if step.settings.rank_scaling else None
        one_momentum.step_low_rank(updates, "exp_avg", _formula(step.settings), step, scales)

    def step_dense(self, updates: Sequence[DenseUpdate], step: Step[LionSettings]) -> None:
        one_momentum.step_dense(updates, "exp_avg", _formula(step.settings), step)


def _formula(settings: LionSettings) -> one_momentum.Formula:
    def step(m: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        new = m.lerp(g, 1 - settings.beta2)
        return new, -torch.sign(m.lerp(g, 1 - settings.beta1))

    return step
