"""What a backward pass demands of its forward pass, and what it costs to keep or to recompute each value on the way.

`oasis_fx.passes.plan_saves` chooses; this is the choice that it has, read off a joint graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from oasis_fx._torch.joint_graphs import is_tangent
from oasis_fx.graph.edits import ancestors, dependents, outputs, value
from oasis_fx.graph.facts import SavePlan
from oasis_fx.memory.node_costs import num_bytes, storage_node
from oasis_fx.memory.recompute_prices import recompute_price

# Of two tensors of equal price a byte, the one that is made later is kept: it is let go sooner. Equal layers would
# otherwise all change sides at one rate, and no budget between could be met.
_HELD_LONGER = 0.05


@dataclass(frozen=True)
class SaveProblem:
    """A forward pass as a choice of what to keep.

    Its values are the nodes that own memory, and those that make several tensors. A view is no value of its own: it
    counts as the one whose memory it looks at.
    """

    needs: Mapping[fx.Node, tuple[fx.Node, ...]]  # value -> the values it is computed from
    demands: frozenset[fx.Node]
    price: Mapping[fx.Node, float]
    bytes_held: Mapping[fx.Node, float]  # where kept; more for what is held longer, infinite for what cannot be kept
    demanded: frozenset[fx.Node]  # nodes, views among them, that the backward pass reads
    required: frozenset[fx.Node]  # values of the user's forward pass

    def held(self, plan: SavePlan) -> float:
        """Return the bytes that a plan keeps, more for what is held longer."""
        return sum(self.bytes_held[node] for node in plan.kept)


def read_problem(graph: fx.Graph, num_forward_outputs: int) -> SaveProblem:
    """Read off a joint graph what its backward pass demands, and what each value costs.

    Requires: fake values on every node; tangents are marked as such.
    """
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
    return SaveProblem(needs, wanted, price, bytes_held, frozenset(demanded), frozenset(required & set(needs)))


def _price_and_bytes(node: fx.Node, required: bool) -> tuple[float, float]:
    found = value(node)
    policy = node.meta.get("recompute")
    if isinstance(found, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
        return 0.0, 0.0  # sizes: torch's partitioner sees to them
    size = float(num_bytes(found)) if isinstance(found, torch.Tensor) else math.inf
    if policy in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE):
        return 0.0, math.inf  # in a checkpointed region; torch repeats random numbers there
    if policy == CheckpointPolicy.MUST_SAVE:
        return math.inf, size
    return (recompute_price(node) if required else 0.0), size


def tensor_bytes(node: fx.Node) -> int:
    """Return the bytes of a node's tensor, or 0 where it makes none, or several."""
    return num_bytes(value(node)) if isinstance(value(node), torch.Tensor) else 0
