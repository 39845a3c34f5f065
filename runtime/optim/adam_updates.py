"""Step weights in a subspace by AdamW, all in one call of torch's fused kernel, and dense bfloat16 weights.

In the coordinates of Q [n, r], with G [m, r] the low-rank gradient and hats bias-corrected at step t:

    m = b1 m + (1 - b1) G;   v = b2 v + (1 - b2) G^2;   U = m^ / (sqrt(v^) + eps)
    W = (1 - lr wd) W - lr sqrt(n / r) U Q^T

The entries of U are about 1, whatever the gradient: U Q^T is shorter than a step in all n coordinates by sqrt(r / n),
and the factor makes up for it, so that a learning rate that suits AdamW suits every rank. It is ours (docs/results.md
says what it is worth); ``rank_scaling=False`` leaves it out.

Source: AdamW, arXiv 1711.05101; in a subspace, GaLore, arXiv 2403.03507, and OASIS, arXiv 2604.09406.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.optim.adamw import adamw

from oasis_fx.graph.matricization import as_rows, from_rows
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.rounding import round_stochastically_
from oasis_fx.runtime.optim.strides import all_plain, is_packed, laid_out_as
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate, State, rank_scales, real_view, states_of
from oasis_fx.runtime.optim.weight_steps import (
    add_scaled_,
    step_weights,
    store_weight,
    store_weights,
    zero_directions,
)
from oasis_fx.runtime.roster import once
from oasis_fx.runtime.subspaces.banks import Layout, in_dtypes_of
from oasis_fx.runtime.subspaces.momentum import bias_correction


@dataclass(frozen=True)
class AdamWSettings:
    """The settings of one parameter group at one step, for weights of one dtype."""

    lr: float | torch.Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    stochastic_rounding: bool
    rank_scaling: bool = False
    step_outside_subspace: bool = False


def step_low_rank(updates: Sequence[LowRankUpdate], step: Step[AdamWSettings]) -> None:
    """Update the moments [m, r] and the weights of one device, in place.

    One call of torch's fused AdamW updates the moments of all of them and computes their directions U [m, r]: given
    parameters of zero, a learning rate of 1 and no decay, it leaves -U in the parameters.
    """
    settings = step.settings
    states = once(updates, states_of)
    means = [state["exp_avg"] for state in states]
    directions = zero_directions(updates, means)
    step_fused(
        directions,
        in_dtypes_of([update.factor for update in updates], means),
        states,
        replace(settings, lr=1.0, weight_decay=0.0),
        step.gate,
    )
    scales = once(updates, rank_scales) if settings.rank_scaling else [1.0] * len(updates)
    if not settings.step_outside_subspace:
        step_weights(updates, directions, step, scales)
        return
    for update, minus_u, scale in zip(updates, directions, scales, strict=True):
        whole = update.dense is not None  # the tail is part of what is outside
        step_weights([replace(update, tail=None) if whole else update], [minus_u], step, [scale])
        if update.dense is not None:
            _step_outside(update, minus_u, step)


def _step_outside(update: LowRankUpdate, minus_u: torch.Tensor, step: Step[AdamWSettings]) -> None:
    """Step a weight by the part of a dense gradient outside of the subspace, scaled as AdamW scaled the part inside.

        W = W - lr phi (dW - G Q^T),   phi = ||U|| / ||G|| of each row

    Source: Fira, arXiv 2410.01623, its norm-based scaling, for gradients projected from the right.
    """
    weight, basis, factor = update.weight, update.basis, update.factor
    assert update.dense is not None
    norms = torch.linalg.vector_norm(factor, dim=1, keepdim=True)
    tiny = torch.finfo(factor.dtype).tiny
    minus_phi = -torch.linalg.vector_norm(minus_u, dim=1, keepdim=True) / norms.clamp_min(tiny)
    outside = as_rows(update.dense, update.features).to(basis.dtype) - factor @ basis.mT
    full = weight if weight.dtype == basis.dtype else weight.to(basis.dtype)
    add_scaled_(full, from_rows(minus_phi.to(outside) * outside, weight.shape, update.features), step.settings.lr)
    store_weight(weight, full, step)


def step_fused(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    states: Sequence[State],
    settings: AdamWSettings,
    gate: torch.Tensor | None,
) -> None:
    """Step tensors of one device, of any strides, in place by torch's fused AdamW.

    The kernel pairs elements by their order in memory (`oasis_fx.runtime.optim.strides`): a tensor that is laid out
    otherwise than its weight goes in as a copy, and what the kernel has written to a copy is copied back. Complex
    numbers are pairs of real ones, as in torch's AdamW. The kernel does not raise the versions by which autograd tells
    whether a saved weight has changed, so they are raised here.

    Args:
        weights: of one device, of any floating point or complex dtypes.
        gradients: of each weight, of its shape.
        states: of each weight, with ``exp_avg``, ``exp_avg_sq`` and ``step``.
        settings: for all of them.
        gate: bool scalar on the device; where it is false, nothing changes. None for true.
    """
    means, seconds = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    written = [weights, means, seconds]
    passed = [*written, gradients]
    if not all_plain(*passed):
        written = [[real_view(tensor) for tensor in tensors] for tensors in written]
        plain = [weight if is_packed(weight) else weight.contiguous() for weight in written[0]]
        columns = [*written, [real_view(gradient) for gradient in gradients]]
        passed = [[laid_out_as(tensor, w) for tensor, w in zip(column, plain, strict=True)] for column in columns]
    adamw(
        passed[0],
        passed[3],
        passed[1],
        passed[2],
        [],
        [state["step"] for state in states],
        fused=True,
        found_inf=None if gate is None else (~gate).float(),  # type: ignore[arg-type]
        amsgrad=False,
        beta1=settings.beta1,
        beta2=settings.beta2,
        # On a GPU the kernel takes a learning rate that is a tensor as float32 alone.
        lr=settings.lr.float() if isinstance(settings.lr, torch.Tensor) else settings.lr,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        maximize=False,
    )
    for tensors, copies in zip(written, passed[:3], strict=True):
        for tensor, copy in zip(tensors, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
    torch.autograd.graph.increment_version(weights)


def step_in_float32(updates: Sequence[DenseUpdate], step: Step[AdamWSettings]) -> None:
    """Step weights of one device and of one real dtype whose moments are float32, whatever the dtype of the weights."""
    weights = [update.weight for update in updates]
    flat, stepped = None, weights
    if weights[0].dtype != torch.float32:
        layout = Layout(weights)
        flat = layout.join(weights, torch.float32)
        stepped = layout.parts(flat)
    gradients = in_dtypes_of([update.gradient for update in updates], stepped)
    step_fused(stepped, gradients, [update.state for update in updates], step.settings, step.gate)
    if flat is not None:
        store_weights(weights, flat, step)


def step_dense_bfloat16(weight: torch.Tensor, gradient: torch.Tensor, state: State, step: Step[AdamWSettings]) -> None:
    """Step a bfloat16 weight by AdamW in float32, and round the weight and its moments stochastically.

    Moments are kept in bfloat16, as by torch's AdamW. Rounded to nearest, the second moment could not change by less
    than its last digit, and a step changes it by about ``1 - beta2`` = 0.001 of it, which is less.
    """
    settings, count = step.settings, state["step"] + 1
    g = gradient.float()
    mean = state["exp_avg"].float().lerp(g, 1 - settings.beta1)
    second = torch.addcmul(state["exp_avg_sq"].float() * settings.beta2, g, g, value=1 - settings.beta2)
    bias1, bias2 = (bias_correction(beta, count).float() for beta in (settings.beta1, settings.beta2))
    direction = (mean / bias1) / ((second / bias2).sqrt() + settings.eps)
    new = weight.float() * (1 - settings.lr * settings.weight_decay) - settings.lr * direction
    for target, source in ((weight, new), (state["exp_avg"], mean), (state["exp_avg_sq"], second)):
        if step.gate is not None:
            source = torch.where(step.gate, source, target.float())
        round_stochastically_(target, source, step.generator)
    step.count([state])
