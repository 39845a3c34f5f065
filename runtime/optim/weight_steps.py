"""``W = (1 - lr wd) W - lr U Q^T`` for weights of any layout, in bfloat16 too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from oasis_fx.graph.matricization import add_product_
from oasis_fx.runtime.optim.kernels import fused
from oasis_fx.runtime.optim.rounding import round_stochastically_
from oasis_fx.runtime.optim.updates import LowRankUpdate


class WeightHyper(Protocol):
    """What the step of a weight needs of an optimizer's settings."""

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def stochastic_rounding(self) -> bool: ...


def step_weight(
    update: LowRankUpdate,
    minus_u: torch.Tensor,
    hyper: WeightHyper,
    gate: torch.Tensor | None,
    generator: torch.Generator,
    lr_factor: float = 1.0,
) -> None:
    """Step one weight by -U [m, r], which is zero where ``gate`` is false; weight decay looks at ``gate`` itself.

    ``lr_factor`` multiplies the learning rate, but not in weight decay.
    """
    weight, basis = update.weight, update.basis
    rounding = generator if hyper.stochastic_rounding else None
    if fused.add_product(update, minus_u, 1 - hyper.lr * hyper.weight_decay, hyper.lr * lr_factor, gate, rounding):
        return
    full = weight if weight.dtype == basis.dtype else weight.to(basis.dtype)
    keep = _decay(full, hyper, gate)
    add_product_(full, minus_u, basis, update.features, beta=keep, alpha=hyper.lr * lr_factor)
    store_weight(weight, full, hyper, generator)


def step_dense_weight(
    weight: torch.Tensor,
    minus_u: torch.Tensor,
    hyper: WeightHyper,
    gate: torch.Tensor | None,
    generator: torch.Generator,
) -> None:
    """The same for a direction of the weight's shape: ``W = (1 - lr wd) W + lr (-U)``."""
    full = weight if weight.dtype == minus_u.dtype else weight.to(minus_u.dtype)
    keep = _decay(full, hyper, gate)
    if keep != 1:
        full.mul_(keep)
    full.add_(minus_u, alpha=hyper.lr)
    store_weight(weight, full, hyper, generator)


def _decay(full: torch.Tensor, hyper: WeightHyper, gate: torch.Tensor | None) -> float:
    """The factor that is left to do; under a gate it is done here."""
    keep = 1 - hyper.lr * hyper.weight_decay
    if gate is None or keep == 1:
        return keep
    full.mul_(torch.where(gate, keep, 1.0))
    return 1.0


def store_weight(weight: torch.Tensor, full: torch.Tensor, hyper: WeightHyper, generator: torch.Generator) -> None:
    """Round a float32 copy into its weight; nothing where it is the weight itself."""
    if full is weight:
        return
    if hyper.stochastic_rounding:
        round_stochastically_(weight, full, generator)
    else:
        weight.copy_(full)


def where(gate: torch.Tensor | None, value: torch.Tensor, otherwise: torch.Tensor | None = None) -> torch.Tensor:
    """``value``, or where ``gate`` is false ``otherwise``, zeros by default."""
    if gate is None:
        return value
    return torch.where(gate, value, torch.zeros_like(value) if otherwise is None else otherwise)


def zeros_like(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Zeros of equal shapes and dtypes, in one allocation for each dtype."""
    zeros: dict[int, torch.Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        sizes = [tensors[index].numel() for index in places]
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=tensors[0].device)
        for index, part in zip(places, torch.split(buffer, sizes), strict=True):
            zeros[index] = part.view(tensors[index].shape)
    return [zeros[index] for index in range(len(tensors))]
