"""Step weights by a direction, in any layout and in bfloat16 too: ``W = (1 - lr wd) W - lr U Q^T``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from oasis_fx.graph.matricization import add_product_
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.kernels import dispatch
from oasis_fx.runtime.optim.rounding import round_stochastically_
from oasis_fx.runtime.optim.updates import LowRankUpdate


class WeightSettings(Protocol):
    """The settings of an optimizer that the step of a weight reads."""

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def stochastic_rounding(self) -> bool: ...


def step_weight(
    update: LowRankUpdate, minus_u: torch.Tensor, step: Step[WeightSettings], lr_factor: float = 1.0
) -> None:
    """Step one weight by a direction in the coordinates of its basis.

    Args:
        minus_u: -U [m, r], in the dtype of the basis; zero where the gate of the step is false.
        lr_factor: multiplies the learning rate, except in weight decay.
    """
    weight, basis, settings = update.weight, update.basis, step.settings
    keep, alpha = 1 - settings.lr * settings.weight_decay, settings.lr * lr_factor
    rounding = step.generator if settings.stochastic_rounding else None
    if dispatch.add_product(update, minus_u, keep, alpha, step.gate, rounding):
        return
    full = weight if weight.dtype == basis.dtype else weight.to(basis.dtype)
    add_product_(full, minus_u, basis, update.features, beta=_decay(full, step), alpha=alpha)
    store_weight(weight, full, step)


def step_dense_weight(weight: torch.Tensor, minus_u: torch.Tensor, step: Step[WeightSettings]) -> None:
    """Step one weight by a direction of its own shape: ``W = (1 - lr wd) W + lr (-U)``.

    Args:
        minus_u: -U, float32 or float64; zero where the gate of the step is false.
    """
    full = weight if weight.dtype == minus_u.dtype else weight.to(minus_u.dtype)
    keep = _decay(full, step)
    if keep != 1:
        full.mul_(keep)
    full.add_(minus_u, alpha=step.settings.lr)
    store_weight(weight, full, step)


def _decay(full: torch.Tensor, step: Step[WeightSettings]) -> float:
    """Apply weight decay where there is a gate; return the factor that the caller has to apply, 1 then."""
    keep = 1 - step.settings.lr * step.settings.weight_decay
    if step.gate is None or keep == 1:
        return keep
    full.mul_(torch.where(step.gate, keep, 1.0))
    return 1.0


def store_weight(weight: torch.Tensor, full: torch.Tensor, step: Step[WeightSettings]) -> None:
    """Round a float32 copy of a weight into the weight; do nothing where ``full`` is the weight itself."""
    if full is weight:
        return
    if step.settings.stochastic_rounding:
        round_stochastically_(weight, full, step.generator)
    else:
        weight.copy_(full)


def zeros_like(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return zeros of the shapes and dtypes of tensors of one device, in one allocation for each dtype."""
    zeros: dict[int, torch.Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        sizes = [tensors[index].numel() for index in places]
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=tensors[0].device)
        for index, part in zip(places, torch.split(buffer, sizes), strict=True):
            zeros[index] = part.view(tensors[index].shape)
    return [zeros[index] for index in range(len(tensors))]
