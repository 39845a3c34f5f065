"""OasisMuon: orthogonalised momentum in the subspaces of the weights.

    M = mu M + G [m, r];   O = U V^T of M = U S V^T, by an exact SVD
    O = O min(1, gamma ||O_before|| / ||O||)                      the norm-growth limiter
    W = (1 - lr wd) W - lr scale sqrt(max(m, n)) f O Q^T,   f = sqrt(min(m, n) / r)

One moment only, which is transported to a new basis as M R, and no second moment. An SVD and not
Newton-Schulz's iteration, whose error is large for moments of low rank and bad condition. Other parameters (biases,
norms, embeddings, heads) are AdamW's.

Source: SUMO, arXiv 2505.24749, but for its term G - Q Q^T G, which nobody has here: only dW Q leaves the graph. The
paper's scale is 1 times its learning rate; 0.2 gives updates of the size of AdamW's (Moonlight, arXiv 2502.16982), so
that one learning rate serves all parameters. f is ours: O has min(m, r) directions of length 1 where that of a dense
gradient has min(m, n); with it a step is as long at every rank (docs/results.md has what it is worth).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from oasis_fx.graph.matricization import Features, as_rows
from oasis_fx.runtime.optim.adam_updates import AdamWSettings, step_dense_bfloat16, step_fused
from oasis_fx.runtime.optim.base import SubspaceOptimizer
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.group_settings import (
    check_decays,
    check_flags,
    check_limit,
    check_momentum,
    check_numbers,
    check_rounding,
    learning_rate,
    rounds_stochastically,
)
from oasis_fx.runtime.optim.kernels import dispatch
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate, State
from oasis_fx.runtime.optim.weight_steps import step_weights
from oasis_fx.runtime.subspaces.banks import Layout


@dataclass(frozen=True)
class MuonSettings:
    """The settings of one parameter group at one step, for weights of one dtype."""

    adam: AdamWSettings
    momentum: float
    scale: float
    limit: float
    rank_scaling: bool


class OasisMuon(SubspaceOptimizer):
    """Muon for models compiled with `oasis_backend`.

    Args:
        params: as for `OasisAdamW`.
        lr: learning rate, from 0; a float or a one-element tensor.
        momentum: mu, in [0, 1).
        weight_decay: decoupled, from 0.
        scale: factor of the update, from 0; see above.
        limit: gamma: how much an update's norm may grow from one step to the next, over 1; `math.inf` for any.
        betas, eps: of AdamW, for parameters whose gradient is not low-rank.
        stochastic_rounding: as for `OasisAdamW`.
        rank_scaling: multiply the learning rate of a weight in a subspace by f, see above.

    Raises:
        ValueError: naming the value and what is allowed.
    """

    states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    steps_shards: ClassVar[bool] = False  # the update is orthogonalised over all rows
    dense_states: ClassVar[tuple[str, ...] | None] = ("exp_avg", "exp_avg_sq")
    mean_state: ClassVar[str | None] = None  # a sum of gradients, not a mean

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 1e-2,
        *,
        scale: float = 0.2,
        limit: float = 1.1,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        stochastic_rounding: bool | None = None,
        rank_scaling: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "scale": scale,
            "limit": limit,
            "betas": betas,
            "eps": eps,
            "stochastic_rounding": stochastic_rounding,
            "rank_scaling": rank_scaling,
        }
        super().__init__(params, defaults)

    def check_group(self, group: Mapping[str, Any]) -> None:
        check_numbers(group, "lr", "weight_decay", "scale", "eps")
        check_decays(group)
        check_rounding(group)
        check_flags(group, "rank_scaling")
        check_momentum(group)
        check_limit(group)

    def settings_of(self, group: Mapping[str, Any], dtype: torch.dtype) -> MuonSettings:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        rounding, scaling = rounds_stochastically(group, dtype), bool(group.get("rank_scaling", False))
        decay, eps = float(group["weight_decay"]), float(group["eps"])
        adam = AdamWSettings(learning_rate(group), beta1, beta2, eps, decay, rounding, scaling)
        return MuonSettings(adam, float(group["momentum"]), float(group["scale"]), float(group["limit"]), scaling)

    def projected_states(
        self, state: State, basis: torch.Tensor, features: Features, group: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        # What AdamW kept for the dense weight is a mean of gradients; the momentum here is their sum.
        mean = as_rows(state["exp_avg"], features).to(basis.dtype) @ basis
        return {"momentum_buffer": mean / (1 - float(group["momentum"]))}

    def step_low_rank(self, updates: Sequence[LowRankUpdate], step: Step[MuonSettings]) -> None:
        settings = step.settings
        step_of_weight = Step(settings.adam, step.gate, step.generator)
        momenta = [update.state["momentum_buffer"] for update in updates]
        layout = Layout(momenta)
        before = layout.join(momenta)
        gradient = layout.join([update.factor for update in updates], before.dtype)
        new = step.where(settings.momentum * before + gradient, before)
        torch._foreach_copy_(momenta, layout.parts(new))
        batches: dict[torch.Size, list[LowRankUpdate]] = {}
        for update, m in zip(updates, momenta, strict=True):
            batches.setdefault(m.shape, []).append(update)
        for batch in batches.values():
            directions = orthogonalize(torch.stack([update.state["momentum_buffer"] for update in batch]))
            minus_o = step.where(-_limited([update.state for update in batch], directions, step))
            step_weights(batch, minus_o.unbind(), step_of_weight, [_lr_factor(u, settings) for u in batch])
        step.count([update.state for update in updates])

    def step_dense(self, updates: Sequence[DenseUpdate], step: Step[MuonSettings]) -> None:
        adam = step.settings.adam
        if adam.stochastic_rounding:
            step_of_weight = Step(adam, step.gate, step.generator)
            for update in dispatch.step_dense_bfloat16(updates, step_of_weight):
                step_dense_bfloat16(update.weight, update.gradient, update.state, step_of_weight)
            return
        weights, gradients = [update.weight for update in updates], [update.gradient for update in updates]
        step_fused(weights, gradients, [update.state for update in updates], adam, step.gate)


def _limited(states: Sequence[State], o: torch.Tensor, step: Step[MuonSettings]) -> torch.Tensor:
    """Return each O [L, m, r] shortened to what the norm-growth limiter allows, and note its norm in its state."""
    norms = torch.linalg.vector_norm(o, dim=(-2, -1))
    noted = [state.setdefault("update_norm", o.new_zeros(())) for state in states]
    before = torch.stack(noted)
    allowed = torch.where(before > 0, step.settings.limit * before, torch.inf)
    factors = (allowed / norms.clamp_min(torch.finfo(o.dtype).tiny)).clamp_max(1.0)
    torch._foreach_copy_(noted, step.where(norms * factors, before).unbind())
    return o * factors.view(-1, 1, 1)


def orthogonalize(m: torch.Tensor) -> torch.Tensor:
    """Return ``U V^T`` of each ``M = U S V^T`` [L, m, r], without directions whose singular value rounding has made."""
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    kept = s > s[..., :1] * torch.finfo(m.dtype).eps * max(m.shape[-2:])
    return (u * kept.unsqueeze(-2)) @ vh


def _lr_factor(update: LowRankUpdate, settings: MuonSettings) -> float:
    """Return ``scale sqrt(max(m, n)) f``; f makes a step O Q^T as long as that of an orthogonalised dense gradient.

    O is as long as min(m, r) says and not as r, and a dense one as min(m, n): `LowRankUpdate.rank_scale` has neither.
    """
    (m, _), (n, r) = update.factor.shape, update.basis.shape
    factor = settings.scale * math.sqrt(max(m, n))
    if not settings.rank_scaling:
        return factor
    return factor * update.rank_scale * math.sqrt(r / n * min(m, n) / min(m, r))
