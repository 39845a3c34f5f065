"""Steps of optimizers that keep one momentum for each weight, as SGD and Lion do.

The momenta of all weights are put into one buffer, and their gradients into another, so that a formula that works
entry by entry runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from oasis_fx.runtime.optim.chunks import in_chunks
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate, real_update
from oasis_fx.runtime.optim.weight_steps import step_dense_weights, step_weights
from oasis_fx.runtime.subspaces.banks import Layout

# (momentum, gradient) -> (momentum after the step, -U), all of one shape and dtype.
Formula: TypeAlias = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def step_low_rank(
    updates: Sequence[LowRankUpdate], name: str, formula: Formula, step: Step[Any], lr_factors: Sequence[float] | None
) -> None:
    """Step weights of one device and dtype whose momentum [m, r] is in the coordinates of a basis.

    Args:
        name: of the momentum, in the states.
        lr_factors: as for `step_weights`.
    """
    momenta = [update.state[name] for update in updates]
    minus_u = _minus_u(momenta, [update.factor for update in updates], formula, step)
    step_weights(updates, Layout(momenta).parts(minus_u), step, lr_factors)
    step.count([update.state for update in updates])


def step_dense(updates: Sequence[DenseUpdate], name: str, formula: Formula, step: Step[Any]) -> None:
    """Step weights of one device and dtype by momenta of their own shapes; complex numbers are pairs of real ones."""
    real = [real_update(update) for update in updates]
    for chunk in in_chunks(real, [update.weight.numel() for update in real]):
        momenta = [update.state[name] for update in chunk]
        minus_u = _minus_u(momenta, [update.gradient for update in chunk], formula, step)
        step_dense_weights([update.weight for update in chunk], minus_u, step)
    step.count([update.state for update in updates])


def _minus_u(
    momenta: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], formula: Formula, step: Step[Any]
) -> torch.Tensor:
    """Update momenta in place; return -U of all in one buffer, zeros where the gate is false."""
    layout, wide = Layout(momenta), torch.promote_types(gradients[0].dtype, torch.float32)
    before = layout.join(momenta, wide)
    after, minus_u = formula(before, layout.join(gradients, wide))
    torch._foreach_copy_(list(momenta), layout.parts(step.where(after, before)))
    return step.where(minus_u)
