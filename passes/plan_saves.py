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
from collections.abc import Sequence
from dataclasses import replace

import networkx
from networkx.algorithms.flow import boykov_kolmogorov
from torch import fx

from oasis_fx.graph.facts import JointFacts, SavePlan
from oasis_fx.graph.verifier import PassError
from oasis_fx.memory.save_problem import SaveProblem, read_problem, tensor_bytes
from oasis_fx.memory.waists import waists_to_keep

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
    problem = read_problem(graph, num_forward_outputs)
    if not problem.demands:
        return SavePlan((), (), 0, 0.0)
    problem = replace(problem, price={**problem.price, **dict.fromkeys(waists_to_keep(problem, budget), math.inf)})
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
        too_large = [node for node in free if problem.bytes_held[node] < math.inf and tensor_bytes(node) > room]
        if room <= _CLOSE_ENOUGH * budget or not too_large:
            break
        problem = replace(problem, bytes_held={**problem.bytes_held, **dict.fromkeys(too_large, math.inf)})
        most = _cut(problem, 1e-6)
    return least


def _closest(problem: SaveProblem, most: SavePlan, least: SavePlan, budget: int) -> tuple[SavePlan, SavePlan]:
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


def _cut(problem: SaveProblem, rate: float) -> SavePlan:
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
    return SavePlan(tuple(kept), recomputed, sum(map(tensor_bytes, kept)), price)


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
