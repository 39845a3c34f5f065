"""Coordinate slots: how the low-rank gradient of a compiled graph reaches the parameter that it belongs to.

The compiled graph takes, for each rewritten weight, an input S [m, r] that it does not read; the gradient that
it returns for S is G [m, r]. S is made from the weight by an autograd function outside of the graph, whose
backward turns G into a `LowRankGrad` for the weight itself: hooks, `torch.autograd.grad`, accumulation and
clipping see the parameter's own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oasis_fx.runtime.layout import Features, num_rows
from oasis_fx.runtime.low_rank_grad import LowRankGrad
from oasis_fx.runtime.subspace import Subspace, Versions

# The storage behind every slot of one dtype and device. It never moves: CUDA graphs may keep its address.
_zeros: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def coordinate_slots(
    weights: Sequence[torch.Tensor],
    subspaces: Sequence[Subspace],
    features: Sequence[Features],
    versions: Versions | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return a slot S [m, r] for each weight, without memory of its own.

    Args:
        weights: trained parameters.
        subspaces: for each weight, the subspace whose basis the graph is called with.
        features: for each weight, which of its dimensions are n.
        versions: of this call, where the graph itself notes which it uses. None: the present ones.
    """
    if versions is None:
        versions = Versions()
        for subspace in subspaces:
            versions.note(subspace)
    slots: tuple[torch.Tensor, ...] = _Slots.apply(  # type: ignore[no-untyped-call]
        tuple(subspaces), tuple(features), versions, *weights
    )
    return slots


class _Slots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        subspaces: tuple[Subspace, ...],
        features: tuple[Features, ...],
        versions: Versions,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.subspaces, ctx.features, ctx.weights = subspaces, features, weights
        ctx.versions = versions
        return tuple(
            _zero(weight).expand(num_rows(weight.shape, dims), subspace.shape[1])
            for weight, subspace, dims in zip(weights, subspaces, features, strict=True)
        )

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # Dynamo would trace it within a compiled step
    def backward(ctx: Any, *factors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: a weight rewritten by oasis_fx has no gradient of its gradient, as compiled "
                "graphs of torch have none. Call the model uncompiled where you need it"
            )
        gradients: list[torch.Tensor | None] = []
        seen: set[int] = set()
        for factor, subspace, dims, weight in zip(factors, ctx.subspaces, ctx.features, ctx.weights, strict=True):
            if factor is None:
                gradients.append(None)
                continue
            if not ctx.versions.hold(subspace):
                raise RuntimeError(
                    "a basis moved between the forward and the backward pass (optimizer.step() in between?): "
                    "the gradient would be in coordinates that are gone"
                )
            if factor.data_ptr() in seen:
                factor = factor.clone()  # autograd adds in place into what it takes over
            seen.add(factor.data_ptr())
            gradients.append(LowRankGrad(factor, subspace, weight, features=dims))
        return (None, None, None, *gradients)


def _zero(weight: torch.Tensor) -> torch.Tensor:
    key = weight.dtype, weight.device
    if key not in _zeros:
        _zeros[key] = torch.zeros(1, dtype=weight.dtype, device=weight.device)
    return _zeros[key]
