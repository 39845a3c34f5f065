"""Have the backward pass read inputs that the graph changes from copies made before the change.

    before   p, f(p), new = g(p), p.copy_(new)       f(p) could be recomputed in the backward pass, from the new p
    after    p, c = clone(p), f(c), new = g(p), p.copy_(new)        c is kept, or what was computed from it

A joint graph is functional: all that it does to its inputs (a buffer with moving averages, an activation changed in
place) stands at its end. Partitioners, torch's and ours, take an input for something that is still there in the
backward pass and recompute from it. By then it has changed. Inductor makes that more frequent: it takes
the user's own ``x.clone()`` in a joint graph for an operation without effect, and removes it.

Here every path from such an input to the backward pass goes through a copy, which is tagged so that no partitioner
recomputes it. Inductor removes the copy where the forward pass alone reads it. The rest of the graph, such as the
running statistics of BatchNorm, which no gradient asks for, reads the input itself.

Requires: fake values on every node; inputs and outputs are described.
Ensures:  nothing that can be recomputed in the backward pass reads an input that the graph changes, nor a view of one,
          but for what the backward pass itself reads before changing it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from oasis_fx._torch.joint_graphs import changed_inputs, is_backward_write, is_tangent, is_write, traced_in_backward
from oasis_fx.graph.edits import ancestors, aten, dependents, insert_after, outputs, value
from oasis_fx.graph.facts import JointFacts
from oasis_fx.memory.node_costs import num_bytes, storage_node, viewed


def keep_changed_inputs(gm: fx.GraphModule, facts: JointFacts) -> JointFacts:
    """Insert the copies; return ``facts`` as they are.

    Some are read by the backward pass alone (`copies_not_made`): who splits the graph has to see to it that the forward
    graph makes them.
    """
    graph = gm.graph
    changed = changed_inputs(graph)
    relevant = _relevant(graph, facts.num_forward_outputs) if changed else set()
    late = traced_in_backward(graph)
    for placeholder, in_forward in changed.items():
        readers = _readers(placeholder, relevant)
        if not in_forward:
            # The backward pass changes it in its last lines. Till then it reads what is there at that time.
            _read_in_backward(user for users in readers.values() for user in users if user in late)
            readers = {node: [user for user in users if user not in late] for node, users in readers.items()}
        places = [node for node, users in readers.items() if users]
        if in_forward and _is_whole_cheaper(readers, places):
            places, readers = [placeholder], {placeholder: [user for user in placeholder.users if user in relevant]}
        for place in places:
            # With its default spelled out it is another operation than a clone of the user's: not merged with it.
            copy = insert_after(graph, place, aten.clone.default, place, memory_format=torch.preserve_format)
            copy.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            for reader in readers[place]:
                reader.replace_input_with(place, copy)
    return facts


def copies_not_made(graph: fx.Graph, num_forward_outputs: int) -> list[fx.Node]:
    """Return the copies that have to be kept and that no forward output is computed from."""
    made = ancestors(node for node in outputs(graph)[:num_forward_outputs] if isinstance(node, fx.Node))
    return [
        node
        for node in graph.find_nodes(op="call_function", target=aten.clone.default)
        if node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE
        and node not in made
        and storage_node(node.all_input_nodes[0]).op == "placeholder"
    ]


def _read_in_backward(readers: Iterable[fx.Node]) -> None:
    """Have no partitioner move these into the forward pass, nor what is computed from them."""
    for node in dependents(readers):
        if node.op == "call_function" and not is_write(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def _relevant(graph: fx.Graph, num_forward_outputs: int) -> set[fx.Node]:
    """Nodes that take part in a gradient, or in what else the backward graph returns or writes."""
    of_tangents = dependents(node for node in graph.find_nodes(op="placeholder") if is_tangent(node))
    returned = [node for node in outputs(graph)[num_forward_outputs:] if isinstance(node, fx.Node)]
    written = [node for node in graph.nodes if is_backward_write(node)]
    wanted = ancestors([*(of_tangents - {graph.output_node()}), *returned, *written])
    return {node for node in wanted if not is_write(node)}


def _readers(placeholder: fx.Node, relevant: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """What reads an input and has memory of its own, by the input or the view of it that it reads."""
    found: dict[fx.Node, list[fx.Node]] = {}
    pending = [placeholder]
    while pending:
        node = pending.pop()
        users = [user for user in node.users if user in relevant]
        views = [user for user in users if viewed(user) is not None]
        found[node] = [user for user in users if user not in views]
        pending += views
    return found


def _is_whole_cheaper(readers: dict[fx.Node, list[fx.Node]], places: list[fx.Node]) -> bool:
    """Whether one copy of the input is no larger than copies of the views that are read."""
    placeholder = next(iter(readers))
    if any(node.target is aten.as_strided.default for node in readers):
        return False  # it counts from the start of a storage, which a copy need not lay out alike
    return num_bytes(value(placeholder)) <= sum(num_bytes(value(node)) for node in places)
