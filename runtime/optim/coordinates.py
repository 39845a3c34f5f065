"""Keep the states of weights in the present coordinates of their bases: transport them where a basis has moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from oasis_fx._torch.precision import whole_float32_products
from oasis_fx.runtime.optim.algorithm import Algorithm
from oasis_fx.runtime.optim.chunks import in_chunks
from oasis_fx.runtime.optim.states import basis_before, note_basis
from oasis_fx.runtime.optim.updates import State, is_low_rank
from oasis_fx.runtime.subspaces.banks import as_bank
from oasis_fx.runtime.subspaces.momentum import Momentum
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace


@dataclass(frozen=True)
class Route:
    """States of one group, of equal shapes, that are transported together.

    Attributes:
        states: of L weights.
        places: of each, the place of its overlap among those that the routes were found for.
        group: the parameter group of the weights.
    """

    states: Sequence[State]
    places: Sequence[int]
    group: Mapping[str, Any]


def transport_states(optimizer: Algorithm, moves: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Transport the states of weights, batched over weights of one group with equal m and r, as many as make a chunk.

    Args:
        moves: each weight with its R = Q^T Q+ [r, r]; weights without low-rank states are passed over.
    """
    overlaps = [overlap for _, overlap in moves]
    transport_along(optimizer, find_routes(optimizer, [weight for weight, _ in moves], overlaps), overlaps)


def find_routes(
    optimizer: Algorithm, weights: Sequence[torch.Tensor], overlaps: Sequence[torch.Tensor]
) -> list[list[Route]]:
    """Return what is transported together: lists of routes, whose states are worked on at once.

    They hold as long as the weights have the same states and groups, and overlaps of the same dtypes and devices.
    """
    if not weights or not optimizer.states:
        return []
    first = optimizer.states[0]
    # By numbers, as many weights are looked up, and torch hashes a tensor in Python.
    groups: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        groups.update(dict.fromkeys(map(id, group["params"]), group))
    by_id = {id(group): group for group in (*optimizer.param_groups, optimizer.defaults)}
    batches: dict[Any, list[tuple[State, int]]] = {}
    for place, (weight, overlap) in enumerate(zip(weights, overlaps, strict=True)):
        state = optimizer.state[weight]
        if is_low_rank(state):
            # The defaults count for a bound weight that was removed from its group.
            key = id(groups.get(id(weight), optimizer.defaults)), overlap.dtype, overlap.device
            batches.setdefault(key, []).append((state, place))
    found = []
    for (number, *_), batch in batches.items():
        for chunk in in_chunks(batch, [state[first].numel() for state, _ in batch]):
            by_shape: dict[torch.Size, list[tuple[State, int]]] = {}
            for state, place in chunk:
                by_shape.setdefault(state[first].shape, []).append((state, place))
            pairs = [tuple(zip(*equal, strict=True)) for equal in by_shape.values()]
            found.append([Route(states, places, by_id[number]) for states, places in pairs])
    return found


def lay_side_by_side(optimizer: Algorithm, routes: Iterable[Sequence[Route]]) -> None:
    """Move the states of each route side by side in memory, so that transport neither gathers nor scatters them.

    States in eight bits stay where they are.
    """
    for route in (route for together in routes for route in together):
        for name in (*optimizer.states, "step"):
            tensors = [state[name] for state in route.states]
            if not all(map(torch.is_floating_point, tensors)):
                continue
            bank = as_bank(tensors)
            if bank.data_ptr() != tensors[0].data_ptr():
                for state, tensor in zip(route.states, bank.unbind(), strict=True):
                    state[name] = tensor


def transport_along(optimizer: Algorithm, routes: Iterable[Sequence[Route]], overlaps: Sequence[torch.Tensor]) -> None:
    """Transport states along routes by R = Q^T Q+ [r, r], at the place that a route names."""
    for together in routes:
        with optimizer.states_in_place([state for route in together for state in route.states]) as states:
            rest = iter(states)
            for route in together:
                bank = torch.stack([overlaps[place] for place in route.places])
                with whole_float32_products(bank.device.type):  # a product with I, of no move, is exact
                    optimizer.transport(list(islice(rest, len(route.states))), bank, route.group)


def transport_pending(optimizer: Algorithm) -> None:
    """Transport states where a basis has moved within forward or backward passes since the last step."""
    for subspace, weights in optimizer.subspaces().items():
        if subspace.has_pending_move:
            overlap = subspace.overlap
            if subspace.spec.rule.transports and overlap is not None:
                transport_states(optimizer, [(weight, overlap) for weight in weights])
            subspace.forget_pending_move()
            for weight in weights:
                optimizer.bind(weight, subspace)


def transport_to_present(optimizer: Algorithm, weight: torch.Tensor, state: State, subspace: Subspace) -> None:
    """Transport the states of a weight, from whatever basis they are in, to the present one of ``subspace``."""
    if "features" not in state or not subspace.spec.rule.transports:
        return
    binding = optimizer.bindings.get(weight)
    if binding is not None and binding.subspace is subspace:
        if binding.version != subspace.version:  # another optimizer, whose weights share the basis, has moved it
            overlap = subspace.overlap_since(binding.version)
            assert overlap is not None  # `find_items` has seen to it
            transport_states(optimizer, [(weight, overlap)])
        return
    # Loaded from a checkpoint, or taken from another graph or backend. Equal bases are not multiplied: a resumed run
    # is bitwise the uninterrupted one.
    held = None if binding is None else binding.subspace
    old, basis = basis_before(state, held, subspace), subspace.basis.detach()
    if old is not None and old.shape == basis.shape and not torch.equal(old, basis):
        transport_states(optimizer, [(weight, old.mT @ basis)])


def bind_resting(optimizer: Algorithm, active: Iterable[torch.Tensor]) -> None:
    """Bind weights that were loaded in a subspace and take no part in this step, as frozen ones: it is to move now.

    Args:
        active: the weights that take part.
    """
    # Keys that are no tensors are foreign; torch.distributed.checkpoint leaves some with our entries.
    unbound = [
        (weight, state)
        for weight, state in optimizer.state.items()
        if isinstance(weight, torch.Tensor) and "features" in state and weight not in optimizer.bindings
    ]
    if not unbound:  # at every step but few
        return
    active = set(active)
    for weight, state in unbound:
        if weight in active:
            continue
        for subspace in STORE.all_of(weight):
            if "basis" not in state or subspace.shape == state["basis"].shape:
                if is_low_rank(state):
                    transport_to_present(optimizer, weight, state, subspace)
                note_basis(state, subspace)
                optimizer.bind(weight, subspace)
                break


def bind_all(
    optimizer: Algorithm, members: Mapping[Subspace, Sequence[torch.Tensor]] | None = None, *, at_rest: bool = False
) -> None:
    """Bind all states to the bases as they are now, and write into them what a checkpoint needs of these bases.

    Args:
        members: what `Algorithm.subspaces` returns now, where the caller has it.
        at_rest: whether all states are as the last step left them, so that one weight of a subspace stands for all.
    """
    for subspace, weights in (optimizer.subspaces() if members is None else members).items():
        # What moved before the first step of its weights moved from a random start: there is nothing to transport.
        subspace.forget_pending_move()
        shared = optimizer.bindings[weights[0]]
        shared.version = subspace.version
        if not at_rest or not subspace.is_noted_in(optimizer.state[weights[0]]):
            for weight in weights:
                optimizer.bindings[weight] = shared
                note_basis(optimizer.state[weight], subspace)
        if optimizer.mean_state is not None and getattr(subspace.spec.rule, "uses_momentum", False):
            _lend_momentum(optimizer, subspace, weights, optimizer.mean_state)


def _lend_momentum(optimizer: Algorithm, subspace: Subspace, weights: Iterable[torch.Tensor], mean: str) -> None:
    """Give a subspace whose rule moves the basis by a momentum the first moment of its weight."""
    groups = optimizer.groups_by_weight()
    for weight in weights:
        state = optimizer.state[weight]
        if is_low_rank(state):
            subspace.momentum = Momentum(state[mean], state["step"], optimizer.mean_decay(groups[weight]))
