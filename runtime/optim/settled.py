"""Recognise parameters of which nothing has changed since the last step, so that they need not be looked at again.

A training loop comes to rest after its first steps: the same parameters have gradients of the same kind, in the same
subspaces, and states that are where the last step left them. What a step found out about such a parameter then holds at
the next one, but for its gradient. Whatever else may have happened in between to a parameter, to its state or to its
subspace is in what `Settled.takes` compares; where anything differs, the parameter is looked at as at its first step.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.optim.updates import State, is_low_rank
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace

if TYPE_CHECKING:
    from oasis_fx.runtime.optim.algorithm import Algorithm, Binding
    from oasis_fx.runtime.optim.items import Item


@dataclass(frozen=True)
class Rest:
    """What a step leaves for the next one.

    Attributes:
        entries: `SubspaceStore.state_of_entries` then.
        items: the parameters that are settled, by the number of the parameter object.
    """

    entries: tuple[int, ...]
    items: Mapping[int, Settled]


class Settled:
    """A parameter as a step has left it.

    Attributes:
        item: what the step found out about the parameter; its gradient is put in at each step and taken out after it.
        name: of one of the states, whose device stands for that of all.
    """

    __slots__ = ("binding", "device", "dtype", "entries", "item", "kind", "name", "shape", "state", "strides")

    def __init__(self, item: Item, state: State, binding: Binding | None, name: str) -> None:
        weight = item.weight
        self.item, self.state, self.binding, self.name = item, state, binding, name
        self.kind, self.shape, self.dtype, self.device = type(weight), weight.shape, weight.dtype, weight.device
        self.strides, self.entries = weight.stride(), tuple(state.values())

    def takes(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        group: Mapping[str, Any],
        optimizer: Algorithm,
        versions: dict[Subspace, int],
    ) -> bool:
        """Return whether all is as the last step left it, and a gradient is of the kind that it was then.

        Args:
            versions: of subspaces, as far as they were looked up in this step; more are added.
        """
        item, state, binding = self.item, self.state, self.binding
        if item.weight is not weight or item.group is not group:
            return False
        if optimizer.state.get(weight) is not state or optimizer.bindings.get(weight) is not binding:
            return False
        if len(state) != len(self.entries) or not all(map(operator.is_, state.values(), self.entries)):
            return False
        # Objects may be the same and `.data` of them not.
        if type(weight) is not self.kind or weight.dtype != self.dtype or weight.device != self.device:
            return False
        if weight.shape != self.shape or weight.stride() != self.strides:
            return False
        if gradient.shape != self.shape or state[self.name].device != self.device:
            return False
        if binding is None:
            return type(gradient) is torch.Tensor and gradient.layout is torch.strided
        if type(gradient) is not LowRankGrad:
            return False
        cell, subspace = gradient.cell, binding.subspace
        version = versions.get(subspace)
        if version is None:
            version = versions[subspace] = subspace.version
        if cell.version != version or binding.version != version or cell.subspace is not subspace:
            return False
        return not (cell.is_dense or cell.is_mixed) and cell.features == item.features


def settled_items(optimizer: Algorithm) -> Mapping[int, Settled]:
    """Return the parameters that the last step has left settled; none once any weight has another subspace."""
    rest = optimizer.rest
    return {} if rest is None or rest.entries != STORE.state_of_entries else rest.items


def settle(optimizer: Algorithm, items: Iterable[Item], *, at_rest: bool) -> None:
    """Note, at the end of a step, what the next one may take for granted.

    Left out, and looked at anew at each step, is what changes with every step or is rare: a basis that is made from a
    code, weights on several devices or in shards, dense gradients of weights that are in a subspace, full-size states.

    Args:
        at_rest: whether the plan of this step may serve the next one too. What the step itself has put into the states
            in place of something else, as a step size that is found during training, counts as no change then.
    """
    known, found = settled_items(optimizer), dict[int, Settled]()
    for item in items:
        number = id(item.weight)
        settled = known.get(number)
        if settled is None or settled.item is not item:
            settled = _settled(optimizer, item)
        elif at_rest:
            settled.entries = tuple(settled.state.values())
        if settled is not None:
            found[number] = settled
    optimizer.rest = Rest(STORE.state_of_entries, found)


def _settled(optimizer: Algorithm, item: Item) -> Settled | None:
    weight, state = item.weight, optimizer.state.get(item.weight)
    names = optimizer.states_of(item.low_rank)
    if not state or item.data is not weight or any(name not in state for name in names):
        return None
    binding, subspace = optimizer.bindings.get(weight), item.subspace
    if not item.low_rank:
        if subspace is not None or binding is not None or "features" in state or STORE.all_of(weight):
            return None
    elif binding is None or subspace is None or binding.subspace is not subspace:
        return None
    elif not isinstance(item.gradient, LowRankGrad) or not is_low_rank(state):
        return None
    elif subspace.stored_basis is None or subspace.device != weight.device:
        return None
    return Settled(item, state, binding, names[0] if names else "step")
