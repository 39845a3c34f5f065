"""Decide for each tensor of a joint graph: save it, save its projection, or recompute it.

    before   a joint graph and a number of bytes
    after    the nodes to keep for the backward pass, and those that it recomputes

The backward pass demands values of the forward pass. Each is kept, which costs its bytes, or recomputed, which
costs a price (`oasis_fx.memory.recompute_prices`) and demands its inputs in turn. For one exchange rate between bytes
and price the cheapest choice for the whole graph is a minimum cut, exactly: a value v is two nodes, and

    source -> v_in            price of v            cut where v is recomputed
    v_in   -> v_out           rate * bytes of v     cut where v is kept
    v_out  -> u_in            unbounded             recomputing u needs v
    v_out  -> sink            unbounded             where the backward pass demands v

torch's own min-cut has the same shape with prices of 0 or infinity only. Neither P nor C is part of the user's forward
pass: computing them in the backward pass is no recomputation and has price 0, so P is kept where that
frees X, and is computed in the backward pass where X is there anyway.

The rate is searched for on the lower convex hull of (bytes, price), so that the bytes stay within the budget.

Requires: fake values on every node; tangents are marked as such.
Ensures:  what the backward pass demands can be computed from ``kept`` and the graph's inputs by running ``recomputed``;
          views count as the storage they look at.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import networkx
import torch
from networkx.algorithms.flow import boykov_kolmogorov
from torch import fx

from oasis_fx._torch.joint_graphs import is_tangent
from oasis_fx.graph.edits import ancestors, dependents, outputs, value
from oasis_fx.graph.facts import JointFacts, SavePlan
from oasis_fx.graph.verifier import PassError
from oasis_fx.memory.node_costs import num_bytes, storage_node
from oasis_fx.memory.recompute_prices import recompute_price

# Of two tensors of equal price a byte, the one that is made later is kept: it is let go sooner. Equal layers would
# otherwise all change sides at one rate, and no budget between could be met.
_HELD_LONGER = 0.05

_MAX_CUTS = 40
_MAX_ROUNDS = 3
_CLOSE_ENOUGH = 0.05  # of the budget
_UNIT = 2**10  # capacities are whole numbers of this fraction of a byte: augmenting paths in floats may not end


def plan_saves(gm: fx.GraphModule, facts: JointFacts) -> JointFacts:
    """Plan what the forward graph keeps within ``facts.allowed_bytes``, where it must not keep more. Changes nothing.

    Raises:
        PassError: as `cheapest_plan`.
    """
    if facts.allowed_bytes is None:
        return facts
    return replace(facts, plan=cheapest_plan(gm.graph, facts.num_forward_outputs, facts.allowed_bytes))


def cheapest_plan(graph: fx.Graph, num_forward_outputs: int, budget: int) -> SavePlan:
    """Find the cheapest plan that keeps at most ``budget`` bytes, or the one that keeps least where none does.

    Raises:
        PassError: something that the backward pass demands can neither be kept nor recomputed.
    """
    problem = _read(graph, num_forward_outputs)
    if not problem.demands:
        return SavePlan((), (), 0, 0.0)
    problem = replace(problem, price={**problem.price, **dict.fromkeys(_checkpoints(problem, budget), math.inf)})
    least = _cut(problem, 1e9)
    if least.num_bytes > budget:
        return least
    most = _cut(problem, 1e-6)
    for _ in range(_MAX_ROUNDS):
        if most.num_bytes <= budget:
            return most
        most, least = _closest(problem, most, least, budget)
        # Nothing cheaper lies between the two on the hull. Often one large tensor alone makes the step, such as logits:
        # without what is too large, smaller ones may still have room.
        room = budget - least.num_bytes
        free = problem.needs.keys() - set(least.kept)
        too_large = [node for node in free if problem.bytes_held[node] < math.inf and _size(node) > room]
        if room <= _CLOSE_ENOUGH * budget or not too_large:
            break
        problem = replace(problem, bytes_held={**problem.bytes_held, **dict.fromkeys(too_large, math.inf)})
        most = _cut(problem, 1e-6)
    return least


def _closest(problem: _Problem, most: SavePlan, least: SavePlan, budget: int) -> tuple[SavePlan, SavePlan]:
    """Neighbours on the hull, the one above the budget and the one below."""
    for _ in range(_MAX_CUTS):
        held_most, held_least = problem.held(most), problem.held(least)
        if held_most <= held_least or least.price <= most.price:
            break
        rate = (least.price - most.price) / (held_most - held_least)
        found = _cut(problem, rate)
        if found.kept in (most.kept, least.kept):
            break
        if found.num_bytes <= budget:
            least = found
        else:
            most = found
    return most, least


@dataclass(frozen=True)
class _Problem:
    """One forward pass as the cut sees it; values are the nodes that own memory, and nodes that make several."""

    needs: Mapping[fx.Node, tuple[fx.Node, ...]]  # value -> the values it is computed from
    demands: frozenset[fx.Node]
    price: Mapping[fx.Node, float]
    bytes_held: Mapping[fx.Node, float]  # where kept; more for what is held longer, infinite for what cannot be kept
    demanded: frozenset[fx.Node]  # nodes, views among them, that the backward pass reads
    required: frozenset[fx.Node]  # values of the user's forward pass

    def held(self, plan: SavePlan) -> float:
        return sum(self.bytes_held[node] for node in plan.kept)


def _read(graph: fx.Graph, num_forward_outputs: int) -> _Problem:
    tangents = [node for node in graph.find_nodes(op="placeholder") if is_tangent(node)]
    backward = dependents(tangents)
    returned = outputs(graph)
    forward = [node for node in graph.nodes if node.op == "call_function" and node not in backward]
    of_forward = set(forward)
    demanded = {node for node in forward if any(user in backward and user.op != "output" for user in node.users)}
    demanded |= {node for node in returned[num_forward_outputs:] if node in of_forward}
    # What nothing in the backward pass descends from has no part in the choice.
    involved = ancestors(demanded) & of_forward
    required = ancestors(node for node in returned[:num_forward_outputs] if isinstance(node, fx.Node))
    owners = {node: storage_node(node) for node in forward if node in involved}
    needs, price, bytes_held = {}, {}, {}
    for index, node in enumerate(forward):
        if node not in involved or owners[node] is not node:
            continue
        needs[node] = tuple(dict.fromkeys(owners[i] for i in node.all_input_nodes if owners.get(i) in of_forward))
        price[node], bytes_held[node] = _price_and_bytes(node, node in required)
        bytes_held[node] *= 1 + _HELD_LONGER * (1 - index / len(forward))
    wanted = frozenset(owners[node] for node in demanded if owners[node] in of_forward)
    return _Problem(needs, wanted, price, bytes_held, frozenset(demanded), frozenset(required & set(needs)))


def _checkpoints(problem: _Problem, budget: int) -> list[fx.Node]:
    """Waists of the forward pass to keep at any rate, as many as the budget holds.

    Without one, a value near the end is recomputed from the start, at once, and all that it passes on the way is
    held until its own turn comes: few bytes saved, and the peak as if all were.
    """
    waists = _waists(problem)
    sizes = {node: _size(node) for node in waists}
    way, prices = 0.0, {}  # of all that comes before
    for node in problem.needs:
        if node in problem.required and problem.price[node] < math.inf:
            way += problem.price[node]
        prices[node] = way
    segments = len(waists) // 2  # a transformer's block has two waists: behind its attention and behind its MLP
    while segments > 0:
        shortest = 0.9 * prices[waists[-1]] / segments
        chosen, start = [], 0.0
        for node in waists:
            if prices[node] - start >= shortest:
                chosen.append(node)
                start = prices[node]
        if sum(sizes[node] for node in chosen) <= budget:
            return chosen
        segments //= 2
    return []


def _waists(problem: _Problem) -> list[fx.Node]:
    """Values through which all of the forward pass goes: hardly anything else is both made before and read after."""
    values = [node for node in problem.needs if node in problem.required]
    position = {node: index for index, node in enumerate(values)}
    last = dict(position)
    for node in values:
        for source in problem.needs[node]:
            if source in last:
                last[source] = max(last[source], position[node])
    # Masks, rotary tables, an encoder's output: what much of the graph reads is no matter of one place.
    size = {node: _size(node) for node in values if last[node] - position[node] <= len(values) / 3}
    ends: dict[int, int] = {}
    crossing, found = 0, []
    for node in values:
        crossing -= ends.pop(position[node], 0)
        if node not in size:
            continue
        if last[node] > position[node] and crossing <= size[node] / 10:
            found.append(node)
        crossing += size[node]
        ends[last[node]] = ends.get(last[node], 0) + size[node]
    # Logits are a waist too, and no place to keep.
    usual = statistics.median(size[node] for node in found) if found else 0
    return [node for node in found if 0 < size[node] <= 4 * usual and problem.bytes_held[node] < math.inf]


def _price_and_bytes(node: fx.Node, required: bool) -> tuple[float, float]:
    found = value(node)
    policy = node.meta.get("recompute")
    must = torch.utils.checkpoint.CheckpointPolicy
    if isinstance(found, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
        return 0.0, 0.0  # sizes: torch's partitioner sees to them
    size = float(num_bytes(found)) if isinstance(found, torch.Tensor) else math.inf
    if policy in (must.MUST_RECOMPUTE, must.PREFER_RECOMPUTE):
        return 0.0, math.inf  # in a checkpointed region; torch repeats random numbers there
    if policy == must.MUST_SAVE:
        return math.inf, size
    return (recompute_price(node) if required else 0.0), size


def _size(node: fx.Node) -> int:
    return num_bytes(value(node)) if isinstance(value(node), torch.Tensor) else 0


def _cut(problem: _Problem, rate: float) -> SavePlan:
    network = networkx.DiGraph()

    def edge(start: object, end: object, capacity: float) -> None:
        if capacity == math.inf:
            network.add_edge(start, end)
        else:
            network.add_edge(start, end, capacity=round(capacity * _UNIT))

    for node, inputs in problem.needs.items():
        edge("source", ("in", node), problem.price[node])
        edge(("in", node), ("out", node), rate * problem.bytes_held[node])
        for source in inputs:
            edge(("out", source), ("in", node), math.inf)
    for node in problem.demands:
        edge(("out", node), "sink", math.inf)
    try:
        _, (_, sinks) = networkx.minimum_cut(network, "source", "sink", flow_func=boykov_kolmogorov)
    except networkx.NetworkXUnbounded as error:
        raise PassError("plan_saves", None, "a value can neither be kept nor recomputed") from error
    kept = [node for node in problem.needs if ("out", node) in sinks and ("in", node) not in sinks]
    recomputed = _recomputed(problem.demanded, kept)
    price = sum(problem.price.get(node, 0.0) for node in recomputed)
    return SavePlan(tuple(kept), recomputed, sum(map(_size, kept)), price)


def _recomputed(demanded: frozenset[fx.Node], kept: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """What leads from the kept values and the inputs to what is demanded."""
    stop = set(kept)
    found: dict[fx.Node, None] = {}
    pending = sorted(demanded)
    while pending:
        node = pending.pop()
        if node not in stop and node not in found and node.op == "call_function":
            found[node] = None
            pending += node.all_input_nodes
    return tuple(found)
