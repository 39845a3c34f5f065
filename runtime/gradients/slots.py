"""Lends one call of a compiled graph its bases and slots, and takes back what the graph returns as their gradients.

The compiled graph takes, for each group of weights, a basis Q [n, r], a tail T [n, t] where there is one, and a scalar
(the energy), and for each rewritten weight a slot S [m, r + t] that it does not read. The gradients that it returns for
them are C = X^T X Q [n, r], ||X||^2 and G [m, r + t], where X is the activation that the group reads. A tail has none.
One autograd function outside of the graph makes all other inputs from the weights. Its backward pass hands C and
||X||^2 to the subspaces and turns G into a `LowRankGrad`, which becomes the gradient of the weight itself.

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
from oasis_fx.runtime.gradients.cell import Cell
from oasis_fx.runtime.gradients.low_rank_grad import wrap
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
        tails: the tail T [n, t] of each group, which has no gradient; without columns for a group that has none. Empty
            where no group has one.
        energies: a scalar for each group, whose gradient is ||X||^2. Empty where the graph takes none.
        slots: S [m, r], [m, r + t] with a tail, for each weight, group by group, in the weight's dtype. All entries of
            a slot are one zero in memory that every slot of its dtype and device shares.
    """

    bases: tuple[torch.Tensor, ...]
    tails: tuple[torch.Tensor, ...]
    energies: tuple[torch.Tensor, ...]
    slots: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Loan:
    """What the loans of all calls with the same weights have in common. It holds no weights, and no subspaces.

    Attributes:
        owners: for each weight, the position of its group.
        features: for each weight the dimensions that make up n.
        slots: S for each weight; each call is lent an alias.
        has_energies: whether the graph takes a scalar for each group.
    """

    owners: tuple[int, ...]
    features: tuple[Features, ...]
    slots: tuple[torch.Tensor, ...]
    has_energies: bool

    @staticmethod
    def of(groups: Sequence[Group], has_energies: bool = True) -> Loan:
        """Return what calls with the weights of these groups are lent."""
        owners, features, slots = [], [], []
        for at, group in enumerate(groups):
            for weight, dims in zip(group.weights, group.features, strict=True):
                owners.append(at)
                features.append(dims)
                slots.append(_zero(weight).expand(num_rows(weight.shape, dims), group.subspace.num_columns))
        return Loan(tuple(owners), tuple(features), tuple(slots), has_energies)


def lend(groups: Sequence[Group], versions: Versions | None = None) -> Lent:
    """Make the inputs that one call of a compiled graph takes besides the user's own, as `lend_again` does."""
    weights = [weight for group in groups for weight in group.weights]
    return lend_again(Loan.of(groups), [group.subspace for group in groups], weights, versions)


def lend_again(
    loan: Loan, subspaces: Sequence[Subspace], weights: Sequence[torch.Tensor], versions: Versions | None = None
) -> Lent:
    """Make the inputs that one call of a compiled graph takes besides the user's own.

    Args:
        loan: what is known of the groups of weights that the graph trains.
        subspaces: of each group, with whose bases the graph is called.
        weights: of all groups, in order.
        versions: where the graph itself notes which version of each basis it uses in this call. No bases are lent
            then. None: the present bases are lent, and their versions noted here.

    Raises:
        RuntimeError: in the backward pass through what is returned, where it runs under ``create_graph=True`` or the
            basis of a group has moved since this call.
    """
    foreign.watch()
    made: tuple[torch.Tensor, ...] = _Lend.apply(loan, subspaces, versions, *weights)  # type: ignore[no-untyped-call]
    num_bases = 0 if versions is not None else len(subspaces)
    num_scalars = len(subspaces) if loan.has_energies else 0
    energies, slots = made[num_bases : num_bases + num_scalars], made[num_bases + num_scalars :]
    return Lent(made[:num_bases], _tails(subspaces), energies, slots)


def _tails(subspaces: Sequence[Subspace]) -> tuple[torch.Tensor, ...]:
    if all(subspace.tail is None for subspace in subspaces):
        return ()
    return tuple(s.basis.detach()[:, :0] if s.tail is None else s.tail.detach() for s in subspaces)


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loan: Loan, subspaces: Sequence[Subspace], versions: Versions | None, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.loan, ctx.subspaces, ctx.weights, ctx.noted = loan, subspaces, weights, versions
        ctx.versions = [subspace.version for subspace in subspaces] if versions is None else None
        bases = [subspace.basis.detach() for subspace in subspaces] if versions is None else ()
        # Nobody writes to these, and an alias by ``.data``, which counts no writes, is made in two thirds of the time.
        energies = [subspace.energy.data for subspace in subspaces] if loan.has_energies else ()
        return *bases, *energies, *[slot.data for slot in loan.slots]

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # Dynamo would trace it within a compiled step
    def backward(ctx: Any, *returned: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        subspaces: Sequence[Subspace] = ctx.subspaces
        if torch.is_grad_enabled():
            names = "; ".join(subspace.spoken_name for subspace in subspaces)
            raise RuntimeError(
                "create_graph=True: a weight rewritten by oasis_fx has no gradient of its gradient, as compiled "
                f"graphs of torch have none. Call the model uncompiled where you need that of {names[:500]}"
            )
        owned, none = _with_owners(returned), (None,) * len(subspaces)
        start = 0 if ctx.versions is None else len(subspaces)
        statistics = owned[:start] or none
        stop = start + (len(subspaces) if ctx.loan.has_energies else 0)
        energies = owned[start:stop] or none
        for subspace, statistic, energy in zip(subspaces, statistics, energies, strict=True):
            if statistic is not None or energy is not None:
                subspace.add_statistic(statistic, energy)
        return None, None, None, *_low_rank(ctx, owned[stop:])


def _low_rank(ctx: Any, factors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Make the gradients of all weights from the factors G [m, r] that the graph has returned.

    Raises:
        RuntimeError: a basis in whose coordinates a factor is has moved since the forward pass.
    """
    present = [subspace.version for subspace in ctx.subspaces]
    if ctx.versions is None:
        moved = [not ctx.noted.hold(subspace) for subspace in ctx.subspaces]
    else:
        moved = [] if ctx.versions == present else [a != b for a, b in zip(ctx.versions, present, strict=True)]
    has_moved = any(moved)
    gradients: list[torch.Tensor | None] = []
    for factor, weight, at, features in zip(factors, ctx.weights, ctx.loan.owners, ctx.loan.features, strict=True):
        if factor is None:
            gradients.append(None)
            continue
        subspace = ctx.subspaces[at]
        if has_moved and moved[at]:
            raise RuntimeError(
                f"the basis of {subspace.spoken_name} moved between the forward and the backward pass "
                "(optimizer.step() in between?), so that its gradient would be in coordinates that are gone: "
                "call optimizer.step() after the backward passes of all forward passes that came before it"
            )
        gradients.append(wrap(Cell(factor, subspace, features, present[at]), weight.shape, weight.stride()))
    return gradients


def _with_owners(returned: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """Make sure that each tensor that a graph returns has one owner, who may add to it in place.

    A graph may return one tensor as the gradient of several inputs: from the second time on it is copied.
    """
    addresses = [given.data_ptr() for given in returned if given is not None]
    if len(set(addresses)) == len(addresses):
        return returned
    seen = {0}  # where tensors without entries are
    owned: list[torch.Tensor | None] = []
    for given in returned:
        address = 0 if given is None else given.data_ptr()
        owned.append(given.clone() if given is not None and address in seen and address else given)
        seen.add(address)
    return owned


def _zero(weight: torch.Tensor) -> torch.Tensor:
    """Return the zero [1] behind every slot of a weight's dtype and device."""
    key = weight.dtype, weight.device
    if key not in _zeros:
        _zeros[key] = torch.zeros(1, dtype=weight.dtype, device=weight.device)
    return _zeros[key]
