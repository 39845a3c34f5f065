"""What the runtime lends to one call of a compiled graph, and how what the graph computes of it gets back.

The compiled graph takes, for each group of weights, a basis Q [n, r] and a scalar (the energy), and for each rewritten
weight a slot S [m, r] that it does not read. The gradients that it returns for them are C [n, r] = A^T A Q, ||A||^2 and
G [m, r]. All of them are made from the weights by one autograd function outside of the graph, whose backward hands C
and ||A||^2 to the subspaces and turns G into a `LowRankGrad` for the weight itself. So hooks, accumulation and clipping
see the parameter's own gradient, and C arrives by every road by which the gradient does: `torch.autograd.grad` and
``backward(inputs=...)``, which skip whatever is no ancestor of the asked for gradients, pass through here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oasis_fx.graph.matricization import Features, num_rows
from oasis_fx.runtime.gradients import foreign
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.subspaces.subspace import Subspace
from oasis_fx.runtime.subspaces.versions import Versions

# The storage behind every slot of one dtype and device. It never moves: CUDA graphs may keep its address.
_zeros: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


@dataclass(frozen=True)
class Group:
    """Weights of one graph that share a basis; ``features`` are for each weight the dimensions that are n."""

    subspace: Subspace
    weights: tuple[torch.Tensor, ...]
    features: tuple[Features, ...]


@dataclass(frozen=True)
class Lent:
    """What a call is lent.

    Attributes:
        bases: Q [n, r] for each group; none where the graph itself asks for them.
        energies: a scalar for each group.
        slots: S [m, r] for each weight, group by group, without memory of its own.
    """

    bases: tuple[torch.Tensor, ...]
    energies: tuple[torch.Tensor, ...]
    slots: tuple[torch.Tensor, ...]


def lend(groups: Sequence[Group], versions: Versions | None = None) -> Lent:
    """Make what one call of a graph takes.

    Args:
        groups: with the subspaces whose bases the graph is called with.
        versions: of the bases in this call, where the graph itself notes which it uses. None: the present ones.
    """
    foreign.watch()
    if versions is None:
        versions = Versions()
        for group in groups:
            versions.note(group.subspace)
        bases = [group.subspace.basis for group in groups]
    else:
        bases = []
    weights = [weight for group in groups for weight in group.weights]
    made: tuple[torch.Tensor, ...] = _Lend.apply(tuple(groups), bases, versions, *weights)  # type: ignore[no-untyped-call]
    num_bases, num_energies = len(bases), len(groups)
    return Lent(made[:num_bases], made[num_bases : num_bases + num_energies], made[num_bases + num_energies :])


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, groups: tuple[Group, ...], bases: list[torch.Tensor], versions: Versions, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.num_bases, ctx.versions = groups, len(bases), versions
        slots = [
            _zero(weight).expand(num_rows(weight.shape, dims), group.subspace.shape[1])
            for group in groups
            for weight, dims in zip(group.weights, group.features, strict=True)
        ]
        return *(b.detach() for b in bases), *(group.subspace.energy.detach() for group in groups), *slots

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # Dynamo would trace it within a compiled step
    def backward(ctx: Any, *returned: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: a weight rewritten by oasis_fx has no gradient of its gradient, as compiled "
                "graphs of torch have none. Call the model uncompiled where you need it"
            )
        groups: tuple[Group, ...] = ctx.groups
        own = _Own()
        statistics = returned[: ctx.num_bases] or (None,) * len(groups)
        energies = returned[ctx.num_bases : ctx.num_bases + len(groups)]
        factors = iter(returned[ctx.num_bases + len(groups) :])
        gradients: list[torch.Tensor | None] = []
        for group, statistic, energy in zip(groups, statistics, energies, strict=True):
            group.subspace.add_statistic(own(statistic), own(energy))
            for weight, dims in zip(group.weights, group.features, strict=True):
                factor = own(next(factors))
                if factor is not None and not ctx.versions.hold(group.subspace):
                    raise RuntimeError(
                        f"the basis of {group.subspace.spoken_name} moved between the forward and the backward pass "
                        "(optimizer.step() in between?): the gradient would be in coordinates that are gone"
                    )
                made = None if factor is None else LowRankGrad(factor, group.subspace, weight, features=dims)
                gradients.append(made)
        return (None, None, None, *gradients)


class _Own:
    """Copies a tensor that was seen before: what is taken over from a graph is added to in place."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def __call__(self, given: torch.Tensor | None) -> torch.Tensor | None:
        if given is None or given.numel() == 0:
            return given
        if given.data_ptr() in self._seen:
            return given.clone()
        self._seen.add(given.data_ptr())
        return given


def _zero(weight: torch.Tensor) -> torch.Tensor:
    key = weight.dtype, weight.device
    if key not in _zeros:
        _zeros[key] = torch.zeros(1, dtype=weight.dtype, device=weight.device)
    return _zeros[key]
