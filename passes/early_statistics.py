"""In a backward graph, compute what rests on no incoming gradient as soon as it can be.

    before   X, P ... all of the backward pass ... C = X^T P     X waits for the end
    after    X, P, C = X^T P ... all of the backward pass        X goes when its last gradient is done

torch orders a backward graph by what the gradients of activations ask for. Nothing asks for C and ||X||^2 but the
output, so they would come last, and each activation that was saved or recomputed for them would be held till then.

What writes to an input (a buffer that the backward pass changes) stays behind all that reads it.

Requires: a backward graph in topological order.
Ensures:  the same nodes in another topological order, placeholders first: compiled autograd and code generation
          take a graph's inputs from the run of placeholders that it starts with.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

from torch import fx

from oasis_fx._torch.joint_graphs import is_tangent, is_write
from oasis_fx.graph.edits import ancestors, dependents

Facts = TypeVar("Facts")


def early_statistics(gm: fx.GraphModule, facts: Facts) -> Facts:
    """Move nodes that only the output waits for to behind the last of their inputs; return ``facts`` as they are."""
    graph = gm.graph
    moved = _waits_for_the_end(graph)
    missing = {node: len(node.all_input_nodes) for node in moved}
    order: list[fx.Node] = []
    ready: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            order.append(node)
            ready += _released_by(node, missing)
            continue
        if node not in moved:
            ready.append(node)
        while ready:
            found = ready.pop(0)
            order.append(found)
            ready += _released_by(found, missing)
    for before, node in pairwise(order):
        if before.next is not node:
            before.append(node)
    return facts


def _released_by(node: fx.Node, missing: dict[fx.Node, int]) -> list[fx.Node]:
    """Users of ``node`` for which it was the last input that they waited for."""
    for user in node.users:
        if user in missing:
            missing[user] -= 1
    return [user for user in node.users if missing.get(user) == 0]


def _waits_for_the_end(graph: fx.Graph) -> set[fx.Node]:
    """Nodes with inputs that neither rest on a tangent nor are needed by what does."""
    placeholders = graph.find_nodes(op="placeholder")
    needed = ancestors(dependents(node for node in placeholders if is_tangent(node)) - {graph.output_node()})
    waiting = {node for node in graph.nodes if node.op == "call_function" and node.all_input_nodes} - needed
    return waiting - dependents(node for node in waiting if is_write(node))
