"""What a step does to which weights, made once for as long as every step finds the same.

Weights of one device and dtype and of equal settings are a batch, which an optimizer steps together. Batches are a
function of the items of a step and of which of their settings are equal. In a loop that has come to rest both are what
they were at the last step (`oasis_fx.runtime.optim.settled`); only the gradients are new.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from oasis_fx.graph.matricization import as_rows
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.optim.algorithm import Algorithm
from oasis_fx.runtime.optim.coordinates import Route, find_routes, lay_side_by_side, transport_along
from oasis_fx.runtime.optim.items import Item
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate
from oasis_fx.runtime.roster import Roster
from oasis_fx.runtime.subspaces.subspace import Subspace

U = TypeVar("U", LowRankUpdate, DenseUpdate)

NO_GRADIENT = torch.empty(0)


class PlannedBatch(Generic[U]):
    """A batch with the items that its updates are of, in order."""

    def __init__(self, items: list[Item], updates: Iterable[U]) -> None:
        self.items = items
        self.updates: Roster[U] = Roster(updates)

    @property
    def device(self) -> torch.device:
        return self.items[0].weight.device

    @property
    def settings(self) -> Hashable:
        """The settings of all of them at this step."""
        return self.items[0].settings


class Plan:
    """The batches of a step, and the subspaces that its weights are in.

    Attributes:
        items: of the step that it was made for.
        low_rank, dense: batches of weights whose states are in the coordinates of a basis, and of all others.
        subspaces: of the items, each once.
        is_closed: whether it serves a second step: the items are settled, and nothing else has a state or is bound.
    """

    def __init__(self, optimizer: Algorithm, items: list[Item]) -> None:
        self.items, self._equal = items, _equal_settings(items)
        self.low_rank = low_rank_batches(optimizer, [item for item in items if item.low_rank])
        self.dense = dense_batches(optimizer, [item for item in items if not item.low_rank])
        self.subspaces = list(dict.fromkeys(item.subspace for item in items if item.subspace is not None))
        self.forget_members()

    def forget_members(self) -> None:
        """Forget which weights are bound to which subspace, as that has changed."""
        self.is_closed = False
        self._members: dict[Subspace, list[torch.Tensor]] = {}
        self._by_device: dict[torch.device, Roster[Subspace]] = {}
        self._routes: dict[torch.device, tuple[list[Subspace], list[int], list[list[Route]]]] = {}

    def serves(self, optimizer: Algorithm, items: list[Item]) -> bool:
        """Return whether it is the plan of another step too, whose items have new gradients.

        Items are equal where they are the same objects, and those that a step shares with the last one are settled.
        Nothing else is bound or has a state, so that there is nothing to look at but these.
        """
        if self.items != items or self._equal != _equal_settings(items):
            return False
        bound = sum(len(batch.items) for batch in self.low_rank)
        self.is_closed = len(optimizer.state) == len(items) and len(optimizer.bindings) == bound
        return self.is_closed

    def members(self, optimizer: Algorithm) -> dict[Subspace, list[torch.Tensor]]:
        """Return what `Algorithm.subspaces` returns: the subspaces that states are in, each with its weights."""
        if not self.is_closed or not self._members:
            self._members = optimizer.subspaces()
        return self._members

    def by_device(self, subspaces: Iterable[Subspace]) -> Mapping[torch.device, Roster[Subspace]]:
        """Return subspaces by their device, in the rosters of the last step where these had the same."""
        found: dict[torch.device, list[Subspace]] = {}
        for subspace in subspaces:
            found.setdefault(subspace.device, []).append(subspace)
        if self._by_device != found:
            self._by_device = {device: Roster(here) for device, here in found.items()}
        return self._by_device

    def transport(
        self,
        optimizer: Algorithm,
        overlaps: Mapping[Subspace, torch.Tensor],
        members: Mapping[Subspace, Sequence[torch.Tensor]],
    ) -> None:
        """Transport the states of all weights whose basis has moved.

        Args:
            overlaps: R = Q^T Q+ [r, r] of the moves, on one device.
            members: the weights of each subspace.
        """
        if not overlaps:
            return
        moved, each, device = list(overlaps), list(overlaps.values()), next(iter(overlaps)).device
        known = self._routes.get(device)
        if known is None or known[0] != moved:
            weights = [weight for subspace in moved for weight in members.get(subspace, ())]
            places = [place for place, subspace in enumerate(moved) for _ in members.get(subspace, ())]
            known = moved, places, find_routes(optimizer, weights, [each[place] for place in places])
            if self.is_closed:
                self._routes[device] = known
                # Where some bases move at this step and others at that, states would not stay where they are put.
                if len(weights) == len(optimizer.bindings):
                    lay_side_by_side(optimizer, known[2])
        transport_along(optimizer, known[2], [each[place] for place in known[1]])

    def take_gradients(self) -> None:
        """Put the gradients of the items into the updates."""
        for batch in self.low_rank:
            for item, update in zip(batch.items, batch.updates, strict=True):
                factor = item.gradient.cell.values  # type: ignore[attr-defined]
                if update.tail is None:
                    update.factor = factor
                else:
                    r = update.basis.shape[1]
                    update.factor, update.tail_factor = factor[:, :r], factor[:, r:]
        for dense in self.dense:
            for item, update_ in zip(dense.items, dense.updates, strict=True):
                update_.gradient = item.gradient

    def drop_gradients(self) -> None:
        """Let go of the gradients, which live as long as their owner wants."""
        for item in self.items:
            item.gradient = NO_GRADIENT
        for batch in self.low_rank:
            for update in batch.updates:
                update.factor, update.tail_factor, update.dense = NO_GRADIENT, None, None
        for dense in self.dense:
            for update_ in dense.updates:
                update_.gradient = NO_GRADIENT


def _equal_settings(items: Iterable[Item]) -> list[int]:
    """Return a number for each item, the same for items of equal settings."""
    by_object: dict[int, int] = {}  # as a group has one object for all its weights of a dtype
    by_value: dict[Hashable, int] = {}
    found = []
    for item in items:
        number = by_object.get(id(item.settings))
        if number is None:
            number = by_object[id(item.settings)] = by_value.setdefault(item.settings, len(by_value))
        found.append(number)
    return found


def low_rank_batches(optimizer: Algorithm, items: Iterable[Item]) -> list[PlannedBatch[LowRankUpdate]]:
    """Return the batches of weights whose states are in the coordinates of a basis."""
    bases: dict[Subspace, torch.Tensor] = {}  # a coded one is made once
    return [
        PlannedBatch(batch, [_low_rank_update(optimizer, item, bases) for item in batch]) for batch in _batches(items)
    ]


def dense_batches(optimizer: Algorithm, items: Sequence[Item]) -> list[PlannedBatch[DenseUpdate]]:
    """Return the batches of weights whose states have their own shape.

    A low-rank gradient of such a weight is a batch of its own, so that one full-size gradient is made at a time.
    """
    alone = [[item] for item in items if isinstance(item.gradient, LowRankGrad)]
    together = _batches(item for item in items if not isinstance(item.gradient, LowRankGrad))
    return [
        PlannedBatch(batch, [DenseUpdate(item.data, item.gradient, optimizer.state[item.weight]) for item in batch])
        for batch in (*alone, *together)
    ]


def _batches(items: Iterable[Item]) -> list[list[Item]]:
    found: dict[Any, list[Item]] = {}
    for item in items:
        found.setdefault((item.weight.device, item.weight.dtype, item.settings), []).append(item)
    return list(found.values())


def _low_rank_update(optimizer: Algorithm, item: Item, bases: dict[Subspace, torch.Tensor]) -> LowRankUpdate:
    state, subspace = optimizer.state[item.weight], item.subspace
    orthonormal, tail = True, None
    if subspace is not None:
        if subspace not in bases:
            bases[subspace] = subspace.basis.to(item.weight.device)
        basis, orthonormal = bases[subspace], subspace.spec.rule.orthonormal
        tail = None if subspace.tail is None else subspace.tail.to(item.weight.device)
    elif "basis" in state:  # loaded from a checkpoint, and not compiled since
        basis = state["basis"]  # others are coded
    else:
        raise RuntimeError(
            f"parameter {item.name} has moments in a drawn basis from a checkpoint, and a dense gradient before any "
            "low-rank one: take the first step after loading with the compiled model"
        )
    if isinstance(item.gradient, LowRankGrad):
        factor, dense = item.gradient.factor, None
        outside = None if tail is None else factor[:, basis.shape[1] :]
        factor = factor if tail is None else factor[:, : basis.shape[1]]
    else:  # a dense gradient of a weight with low-rank states: what the pass would have computed
        dense = item.gradient
        rows = as_rows(dense, state["features"]).to(basis.dtype)
        factor, outside = rows @ basis, None if tail is None else rows @ tail
        weights = None if subspace is None else subspace.projection_weights
        if weights is not None:
            factor = factor * weights.to(factor)
    return LowRankUpdate(item.data, factor, basis, state["features"], state, orthonormal, dense, tail, outside)
