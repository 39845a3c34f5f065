"""AdamW on weights in a subspace, all in one call of torch's fused kernel, and on bfloat16 weights.

In the coordinates of Q [n, r], with G [m, r] the low-rank gradient and hats bias-corrected at step t:

    m = b1 m + (1 - b1) G;   v = b2 v + (1 - b2) G^2;   U = m^ / (sqrt(v^) + eps)
    W = (1 - lr wd) W - lr sqrt(n / r) U Q^T

The entries of U are about 1, whatever the gradient: U Q^T is shorter than a step in all n coordinates by sqrt(r / n),
and the factor makes up for it, so that a learning rate that suits AdamW suits every rank. It is ours (docs/results.md
has what it is worth); ``rank_scaling=False`` leaves it out.

Source: AdamW, arXiv 1711.05101; in a subspace, GaLore, arXiv 2403.03507, and OASIS, arXiv 2604.09406.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.optim.adamw import adamw

from oasis_fx.graph.matricization import as_rows, from_rows
from oasis_fx.runtime.optim.rounding import round_stochastically_
from oasis_fx.runtime.optim.strides import all_plain, is_packed, laid_out_as
from oasis_fx.runtime.optim.updates import LowRankUpdate, State, real_view
from oasis_fx.runtime.optim.weight_steps import step_weight, store_weight, zeros_like
from oasis_fx.runtime.subspaces.momentum import bias_correction


@dataclass(frozen=True)
class Hyper:
    """The settings of one parameter group at one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    stochastic_rounding: bool
    rank_scaling: bool = False
    residual: bool = False


def step_low_rank(
    updates: Sequence[LowRankUpdate], hyper: Hyper, gate: torch.Tensor | None, generator: torch.Generator
) -> None:
    """Update moments and weights of one device.

    Moments and directions of all of them are one call of torch's fused AdamW: on parameters of zero, at a learning
    rate of 1 and without decay, what it leaves in them is -U.

    Args:
        gate: bool scalar; where false, everything stays as it is. None for true.
        generator: for stochastic rounding.
    """
    states = [update.state for update in updates]
    means = [state["exp_avg"] for state in states]
    directions = zeros_like(means)
    step_fused(
        directions,
        [update.factor.to(mean.dtype) for update, mean in zip(updates, means, strict=True)],
        states,
        replace(hyper, lr=1.0, weight_decay=0.0),
        gate,
    )
    for update, minus_u in zip(updates, directions, strict=True):
        step_weight(update, minus_u, hyper, gate, generator, update.rank_scale if hyper.rank_scaling else 1.0)
        if hyper.residual and update.dense is not None:
            _step_outside(update, minus_u, hyper, generator)


def _step_outside(update: LowRankUpdate, minus_u: torch.Tensor, hyper: Hyper, generator: torch.Generator) -> None:
    """Step a weight by what a dense gradient has outside of the subspace, at the length that AdamW gave what is inside:

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
    full.add_(from_rows(minus_phi.to(outside) * outside, weight.shape, update.features), alpha=hyper.lr)
    store_weight(weight, full, hyper, generator)


def step_fused(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    states: Sequence[State],
    hyper: Hyper,
    gate: torch.Tensor | None,
) -> None:
    """torch's fused AdamW on tensors of one device, of any strides; with ``gate`` as in `step_low_rank`.

    The kernel pairs elements by their order in memory (`oasis_fx.runtime.optim.strides`): what is laid out otherwise
    than its weight goes in as a copy, and what the kernel has written to a copy comes back. Complex numbers are pairs
    of real ones, as in torch's AdamW. The kernel does not bump versions, which autograd compares to find out whether a
    saved weight has changed: it is done here.
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
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        lr=hyper.lr,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        maximize=False,
    )
    for tensors, copies in zip(written, passed[:3], strict=True):
        for tensor, copy in zip(tensors, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
    torch.autograd.graph.increment_version(weights)


def step_dense_bfloat16(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    hyper: Hyper,
    gate: torch.Tensor | None,
    generator: torch.Generator,
) -> None:
    """AdamW on a bfloat16 weight with weight and moments rounded stochastically: computed in float32.

    Moments stay in bfloat16 as in torch's AdamW. Rounded to nearest, the second moment could not move by
    less than its last digit, which `1 - beta2` = 0.001 of it is.
    """
    step = state["step"] + 1
    g = gradient.float()
    mean = state["exp_avg"].float().lerp(g, 1 - hyper.beta1)
    second = torch.addcmul(state["exp_avg_sq"].float() * hyper.beta2, g, g, value=1 - hyper.beta2)
    bias1, bias2 = (bias_correction(beta, step).float() for beta in (hyper.beta1, hyper.beta2))
    direction = (mean / bias1) / ((second / bias2).sqrt() + hyper.eps)
    new = weight.float() * (1 - hyper.lr * hyper.weight_decay) - hyper.lr * direction
    for target, source in ((weight, new), (state["exp_avg"], mean), (state["exp_avg_sq"], second)):
        if gate is not None:
            source = torch.where(gate, source, target.float())
        round_stochastically_(target, source, generator)
    state["step"].copy_(step if gate is None else torch.where(gate, step, step - 1))
