"""Finds what one compiled graph is lent at a call, by the parameters of that call.

A graph is called in every step with the same weights, or with those of each of a few equal layers. What is looked up by
a weight (its subspace, and what averages its gradients over ranks) is looked up once for each set of weights, and again
when anything has changed in the stores that hold it, which count their changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, ref

import torch
from torch.nn.parallel import DistributedDataParallel

from oasis_fx._torch.distributed import active_ddp
from oasis_fx.distributed.gradient_sync import GradientSync, state_of_syncs, sync_of
from oasis_fx.graph.facts import DynamoFacts, WeightGroup
from oasis_fx.runtime.gradients.in_graph import control_of, stand_in
from oasis_fx.runtime.gradients.slots import Group, Loan, lend_again
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.state import Family
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace
from oasis_fx.runtime.subspaces.versions import Versions

# How a backend hears which subspaces its graphs use, for its statistics. The store cannot tell it: it is one for all
# backends of the process, and knows subspaces by their weights, not by the graphs that take them.
OnUse = Callable[[Subspace, tuple[str, ...]], Any]


@dataclass(frozen=True)
class _Known:
    """What calls with the same weights have in common. It keeps no weight, subspace or `GradientSync` alive."""

    loan: Loan
    subspaces: tuple[ref[Subspace], ...]
    replicas: tuple[frozenset[int], ...]
    syncs: tuple[ref[GradientSync], ...]
    not_averaged: bool


class Lender:
    """Lends one compiled graph, at each call, what it takes besides its own inputs.

    One compiled graph serves other layers and other models with the same code: nothing of the weights that it was
    compiled with is remembered.
    """

    def __init__(
        self, facts: DynamoFacts, *, split: bool, static: bool, on_use: OnUse | None, syncs: WeakSet[GradientSync]
    ) -> None:
        """Make what lends to the graph of ``facts``, which has at least one group.

        Args:
            split: whether DDP has split the graph out of a larger one.
            static: whether all weights of the graph have the sizes that they were compiled with.
            on_use: called with each subspace that the graph takes, and the names of its weights.
            syncs: gets what averages gradients of this graph over ranks.
        """
        assert facts.layout is not None
        self._groups, self._layout = facts.groups, facts.layout
        self._positions = [index for group in facts.groups for index in group.weights]
        self._names = [tuple(facts.names[index] for index in group.weights) for group in facts.groups]
        self._families = [Family() for _ in facts.groups]
        self._split, self._static, self._on_use, self._syncs = split, static, on_use, syncs
        self._known: tuple[Any, dict[Any, _Known]] = None, {}

    def __call__(self, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """Return the inputs behind those that the graph is called with, in the order of its layout.

        Raises:
            RuntimeError: the model runs under DDP, and nothing averages the gradients of a weight; or the rank of a
                weight has changed.
        """
        weights = [args[index] for index in self._positions]
        key: Any = tuple(map(id, weights))
        if not self._static:
            key = key, tuple([weight.shape for weight in weights])
        ddp = active_ddp()
        known, subspaces, syncs = self._look_up(key, weights, ddp)
        if ddp is not None:
            for sync in syncs:
                sync.follow(ddp)
        for subspace, replicas in zip(subspaces, known.replicas, strict=True):
            subspace.replicas = replicas
        if not self._layout.has_control:
            lent = lend_again(known.loan, subspaces, weights)
            return *lent.bases, *lent.tails, *lent.energies, *lent.slots
        versions = Versions()
        lent = lend_again(known.loan, subspaces, weights, versions)
        stand_ins = [stand_in(subspace.shape, subspace.dtype, subspace.device) for subspace in subspaces]
        return *stand_ins, *[control_of(subspace, versions) for subspace in subspaces], *lent.slots

    def _look_up(
        self, key: Any, weights: Sequence[torch.Tensor], ddp: DistributedDataParallel | None
    ) -> tuple[_Known, list[Subspace], list[GradientSync]]:
        """Return what is known of calls with these weights, found out now where it is not known or has changed.

        The numbers of the weights may be those of other ones that are gone: their entries in the store have gone too.
        """
        state = STORE.state_of_entries, state_of_syncs()
        kept = self._known
        if kept[0] == state and key in kept[1]:
            known = kept[1][key]
            subspaces, syncs = [found() for found in known.subspaces], [found() for found in known.syncs]
            if None not in subspaces and None not in syncs and not (known.not_averaged and ddp is not None):
                return known, subspaces, syncs  # type: ignore[return-value]
        elif kept[0] != state:
            kept = self._known = state, {}
        known, subspaces, syncs = self._find_out(weights, ddp)  # type: ignore[assignment]
        kept[1][key] = known
        return known, subspaces, syncs  # type: ignore[return-value]

    def _find_out(
        self, weights: Sequence[torch.Tensor], ddp: DistributedDataParallel | None
    ) -> tuple[_Known, list[Subspace], list[GradientSync]]:
        rest = iter(weights)
        used, replicas, averaging = [], [], list[GradientSync | None]()
        for group, family, known_as in zip(self._groups, self._families, self._names, strict=True):
            members = tuple(next(rest) for _ in group.weights)
            syncs = [sync_of(weight) for weight in members]
            if ddp is not None and None in syncs:
                raise RuntimeError(
                    "the model runs under DistributedDataParallel, which cannot average low-rank gradients: call "
                    "oasis_fx.distributed.prepare(model) before it is wrapped"
                )
            averaging += syncs
            if syncs[0] is not None:
                self._syncs.add(syncs[0])
            used.append(self._group(members, group, family, known_as))
            replicas.append(frozenset() if syncs[0] is None else syncs[0].replicas)
        subspaces = [group.subspace for group in used]
        distinct = list(dict.fromkeys(sync for sync in averaging if sync is not None))
        known = _Known(
            loan=Loan.of(used, self._layout.has_energy),
            subspaces=tuple(map(ref, subspaces)),
            replicas=tuple(replicas),
            syncs=tuple(map(ref, distinct)),
            not_averaged=None in averaging,
        )
        return known, subspaces, distinct

    def _group(
        self, members: tuple[torch.Tensor, ...], group: WeightGroup, family: Family, known_as: tuple[str, ...]
    ) -> Group:
        """Find the subspace of the weights of a group."""
        if self._split or group.spec.budget is not None:
            _check_rank(members[0], group.spec, self._split, known_as)
        subspace = STORE.resolve(members, group.spec, group.features)
        subspace.family.join(family)
        subspace.names = subspace.names or known_as
        if self._on_use is not None:
            self._on_use(subspace, known_as)
        return Group(subspace, members, group.features)


def _check_rank(weight: torch.Tensor, spec: SubspaceSpec, split: bool, known_as: Sequence[str]) -> None:
    """Refuse a graph of another rank than a weight has by now.

    Raises:
        RuntimeError: the rank of the weight, and so of its group, which the graph knows by these names, has changed.
    """
    if STORE.current_spec(weight, spec) == spec:
        return
    if split:
        raise RuntimeError(
            f"the rank of {', '.join(known_as)} has changed, and DDP's graph splitting hides the weights from their "
            "graphs: set torch._dynamo.config.optimize_ddp = False"
        )
    raise RuntimeError(
        f"layers that share the compiled graph of {', '.join(known_as)} have different ranks, from a checkpoint of a "
        "model that was compiled otherwise: compile the whole model, or load what "
        "resize_checkpoint(state_dict, rank) makes of it"
    )
