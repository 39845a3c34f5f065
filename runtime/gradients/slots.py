"""Lends one call of a compiled graph its bases and slots, and takes back what the graph returns as their gradients.

The compiled graph takes, for each group of weights, a basis Q [n, r] and a scalar (the energy), and for each rewritten
weight a slot S [m, r] that it does not read. The gradients that it returns for them are C = X^T X Q [n, r], ||X||^2 and
G [m, r], where X is the activation that the group reads. One autograd function outside of the graph makes all of these
inputs from the weights. Its backward pass hands C and ||X||^2 to the subspaces and turns G into a `LowRankGrad`, which
becomes the gradient of the weight itself.

So hooks, accumulation and clipping see the parameter's own gradient, and C arrives wherever the gradient does:
`torch.autograd.grad` and ``backward(inputs=...)`` skip whatever does not lead to the gradients that were asked for, and
the weights lead through this function.
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
    """The weights of one graph that share a basis.

    Attributes:
        subspace: the subspace whose basis Q [n, r] they share.
        weights: the parameters, in the order of the graph's slots.
        features: for each weight the dimensions that make up n, as in `oasis_fx.graph.matricization`.
    """

    subspace: Subspace
    weights: tuple[torch.Tensor, ...]
    features: tuple[Features, ...]


@dataclass(frozen=True)
class Lent:
    """The inputs that one call of a compiled graph takes besides the user's own.

    Attributes:
        bases: the basis Q [n, r] of each group, in the dtype of its subspace. Empty where the graph itself asks for
            its bases while it runs.
        energies: a scalar for each group, whose gradient is ||X||^2.
        slots: S [m, r] for each weight, group by group, in the weight's dtype. All entries of a slot are one zero in
            memory that every slot of its dtype and device shares.
    """

    bases: tuple[torch.Tensor, ...]
    energies: tuple[torch.Tensor, ...]
    slots: tuple[torch.Tensor, ...]


def lend(groups: Sequence[Group], versions: Versions | None = None) -> Lent:
    """Make the inputs that one call of a compiled graph takes besides the user's own.

    Args:
        groups: the groups of weights that the graph trains, with the subspaces whose bases it is called with.
        versions: where the graph itself notes which version of each basis it uses in this call. No bases are lent
            then. None: the present bases are lent, and their versions noted here.

    Raises:
        RuntimeError: in the backward pass through what is returned, where it runs under ``create_graph=True`` or the
            basis of a group has moved since this call.
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
        groups: tuple[Group, ...] = ctx.groups
        if torch.is_grad_enabled():
            names = "; ".join(group.subspace.spoken_name for group in groups)
            raise RuntimeError(
                "create_graph=True: a weight rewritten by oasis_fx has no gradient of its gradient, as compiled "
                f"graphs of torch have none. Call the model uncompiled where you need that of {names[:500]}"
            )
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
                        "(optimizer.step() in between?), so that its gradient would be in coordinates that are gone: "
                        "call optimizer.step() after the backward passes of all forward passes that came before it"
                    )
                made = None if factor is None else LowRankGrad(factor, group.subspace, weight, features=dims)
                gradients.append(made)
        return (None, None, None, *gradients)


class _Own:
    """Makes sure that each tensor that a graph returns has one owner, who may add to it in place.

    A graph may return one tensor as the gradient of several inputs: from the second time on it is copied.
    """

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
    """Return the zero [1] behind every slot of a weight's dtype and device."""
    key = weight.dtype, weight.device
    if key not in _zeros:
        _zeros[key] = torch.zeros(1, dtype=weight.dtype, device=weight.device)
    return _zeros[key]
