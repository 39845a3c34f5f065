"""What became of each tensor that the backward pass needs: saved, projected, or recomputed; and its price."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from oasis_fx._torch.joint_graphs import input_placeholders, is_tangent
from oasis_fx.compile.joint import Trace
from oasis_fx.graph.edits import ancestors, dependents, outputs, value
from oasis_fx.inspect.nodes import module_path
from oasis_fx.inspect.printing import operator_name
from oasis_fx.memory.node_costs import node_flops, num_bytes, saved_storages, storage_node
from oasis_fx.memory.recompute_prices import recompute_price

SAVED, PROJECTED, RECOMPUTED, BACKWARD = "saved", "projected", "recomputed", "computed in backward"


@dataclass(frozen=True)
class Decision:
    """One tensor of the forward pass, or of the projections beside it, that the backward pass needs.

    Attributes:
        name: of its node in the rewritten joint graph.
        module: dotted path of the module that makes it; empty where torch kept none.
        operator: what makes it.
        shape: by the hints of symbolic sizes.
        decision: ``"saved"``; ``"projected"``, where P is kept in place of an X that nothing else keeps;
            ``"recomputed"``; or ``"computed in backward"``, of a P or C that the forward pass then need not make.
        num_bytes: of its storage: kept where it is saved, freed where it is not.
        flops: of recomputing it from the inputs of its operator; 0 where that is no matmul.
        price: of the same, in bytes of memory traffic that take as long (`oasis_fx.memory.recompute_prices`); infinite
            where it may not be recomputed. Nothing for what is projected.
    """

    name: str
    module: str
    operator: str
    shape: tuple[int, ...]
    decision: str
    num_bytes: int
    flops: int
    price: float


def decisions(trace: Trace) -> tuple[Decision, ...]:
    """Return the decisions of one graph, in the order of its forward pass."""
    joint, forward, backward = trace.after.graph, trace.forward.graph, trace.backward.graph
    saved = saved_storages(forward, trace.num_forward_outputs)
    made_in_backward = {node.name for node in backward.nodes if node.op == "call_function"}
    rests_on_tangents = dependents(node for node in joint.find_nodes(op="placeholder") if is_tangent(node))
    returned = outputs(joint)[: trace.num_forward_outputs]
    required = {node.name for node in ancestors(node for node in returned if isinstance(node, fx.Node))}
    of_basis = dependents(_bases(trace))
    # What the graph returns depends on a basis as well, G and C do; the return statement itself projects nothing.
    readers = [node for node in of_basis if node.op != "output"]
    projected = {storage_node(source).name for node in readers for source in node.all_input_nodes}
    found = []
    for node in joint.nodes:
        if node.op != "call_function" or node in rests_on_tangents or storage_node(node) is not node:
            continue
        if not isinstance(value(node), torch.Tensor):
            continue
        if node.name in saved:
            decision = SAVED
        elif node.name in made_in_backward and node.name in required:
            decision = RECOMPUTED
        elif node.name in made_in_backward and node in of_basis:
            decision = BACKWARD
        elif node.name in projected and node not in of_basis:
            decision = PROJECTED
        else:
            continue  # not needed, or a derivative, which is computed in the backward pass in any case
        found.append(_decision(node, decision))
    return tuple(found)


def _bases(trace: Trace) -> set[fx.Node]:
    placeholders = input_placeholders(trace.after.graph)
    return {placeholders[site.inputs.basis] for site in trace.sites}


def _decision(node: fx.Node, decision: str) -> Decision:
    maker = node.all_input_nodes[0] if operator_name(node) == "getitem" else node
    # Of several results of one operator the first bears its price.
    priced = node if maker is not node and node.args[1] != 0 else maker
    price = math.nan if decision == PROJECTED else recompute_price(priced)
    shape = tuple(int(size) if isinstance(size, int) else int(size.node.hint or 0) for size in value(node).shape)
    flops = 0 if decision == PROJECTED else node_flops(priced)
    return Decision(
        node.name, module_path(node), operator_name(maker), shape, decision, num_bytes(value(node)), flops, price
    )
