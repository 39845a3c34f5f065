"""Step weights by a direction, in any layout and in bfloat16 too: ``W = (1 - lr wd) W - lr U Q^T``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from oasis_fx.graph.matricization import add_product_
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.kernels import dispatch
from oasis_fx.runtime.optim.rounding import round_stochastically_
from oasis_fx.runtime.optim.tail_directions import with_tails
from oasis_fx.runtime.optim.updates import LowRankUpdate
from oasis_fx.runtime.subspaces.banks import Layout, new_in_banks


class WeightSettings(Protocol):
    """The settings of an optimizer that the step of a weight reads."""

    @property
    def lr(self) -> float | torch.Tensor: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def stochastic_rounding(self) -> bool: ...
    @property
    def rank_scaling(self) -> bool: ...


def step_weights(
    updates: Sequence[LowRankUpdate],
    minus_us: Sequence[torch.Tensor],
    step: Step[WeightSettings],
    lr_factors: Sequence[float] | None = None,
) -> None:
    """Step weights of one device and dtype by directions in the coordinates of their bases, and along their tails.

    On a GPU all weights of a shape are one launch of a kernel.

    Args:
        minus_us: -U [m, r] of each, in the dtype of its basis; zero where the gate of the step is false.
        lr_factors: of each; multiplies the learning rate, except in weight decay. None for 1.
    """
    settings = step.settings
    factors = [1.0] * len(updates) if lr_factors is None else lr_factors
    updates, minus_us = with_tails(updates, minus_us, step)
    left = dispatch.add_products(
        updates,
        minus_us,
        factors,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        gate=step.gate,
        generator=step.generator if settings.stochastic_rounding else None,
    )
    for place in left:
        step_weight(updates[place], minus_us[place], step, factors[place])


def step_weight(update: LowRankUpdate, minus_u: torch.Tensor, step: Step[WeightSettings], lr_factor: float) -> None:
    """Step one weight as `step_weights` does, by torch's operators."""
    weight, basis = update.weight, update.basis
    full = weight if weight.dtype == basis.dtype else weight.to(basis.dtype)
    minus_u, lr = _rated(minus_u, step)
    add_product_(full, minus_u, basis, update.features, beta=_decay([full], step), alpha=lr * lr_factor)
    store_weight(weight, full, step)


def step_dense_weights(weights: Sequence[torch.Tensor], minus_u: torch.Tensor, step: Step[WeightSettings]) -> None:
    """Step weights of one device and dtype by directions of their own shapes: ``W = (1 - lr wd) W + lr (-U)``.

    Each operator runs once for all of them.

    Args:
        minus_u: -U of all of them in one buffer, as their `Layout` has it, float32 or float64; zero where the gate of
            the step is false.
    """
    minus_u, lr = _rated(minus_u, step)
    layout, in_place = Layout(weights), weights[0].dtype == minus_u.dtype
    full = list(weights) if in_place else [layout.join(weights, minus_u.dtype)]
    keep = _decay(full, step)
    if keep != 1:
        torch._foreach_mul_(full, keep)
    torch._foreach_add_(full, layout.parts(minus_u) if in_place else [minus_u], alpha=lr)
    if not in_place:
        store_weights(weights, full[0], step)


def add_scaled_(full: torch.Tensor, change: torch.Tensor, lr: float | torch.Tensor) -> None:
    """Add ``lr`` times a change of equal shape and dtype; a tensor is not read."""
    if isinstance(lr, torch.Tensor):
        full.add_(change * lr)
    else:
        full.add_(change, alpha=lr)


def _rated(minus_u: torch.Tensor, step: Step[WeightSettings]) -> tuple[torch.Tensor, float]:
    """Return a direction and what it is to be multiplied with; it is multiplied here by a rate that is a tensor."""
    lr = step.settings.lr
    return (minus_u * lr, 1.0) if isinstance(lr, torch.Tensor) else (minus_u, lr)


def _decay(full: list[torch.Tensor], step: Step[WeightSettings]) -> float:
    """Apply weight decay where it depends on the device; return the factor that the caller has to apply, 1 then."""
    keep = 1 - step.settings.lr * step.settings.weight_decay
    if not isinstance(keep, torch.Tensor) and (step.gate is None or keep == 1):
        return keep
    torch._foreach_mul_(full, keep if step.gate is None else torch.where(step.gate, keep, 1.0))
    return 1.0


def store_weight(weight: torch.Tensor, full: torch.Tensor, step: Step[WeightSettings]) -> None:
    """Round a float32 copy of a weight into the weight; do nothing where ``full`` is the weight itself."""
    if full is weight:
        return
    if step.settings.stochastic_rounding:
        round_stochastically_(weight, full, step.generator)
    else:
        weight.copy_(full)


def store_weights(weights: Sequence[torch.Tensor], full: torch.Tensor, step: Step[WeightSettings]) -> None:
    """Round copies of weights of one dtype, in one buffer of a wider one as their `Layout` has it, into the weights."""
    if step.settings.stochastic_rounding:
        rounded = torch.empty_like(full, dtype=weights[0].dtype)
        round_stochastically_(rounded, full, step.generator)
        full = rounded
    torch._foreach_copy_(list(weights), Layout(weights).parts(full))


def zero_directions(updates: Sequence[LowRankUpdate], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return zeros of the shapes and dtypes of tensors of one device, in one allocation for each dtype.

    Those of weights of one shape lie side by side, so that `step_weights` reads them as one tensor.
    """
    kinds = [
        (tensor.dtype, tensor.shape, update.basis.shape, update.orthonormal)
        for update, tensor in zip(updates, like, strict=True)
    ]
    return new_in_banks(like, kinds, torch.zeros)
