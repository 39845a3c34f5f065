"""Read and edit the nodes of a graph; every new node gets its fake value at once."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from oasis_fx._torch.dynamo_graphs import copy_dynamo_attributes
from oasis_fx._torch.fake_tensors import unguarded_fake_mode

aten = torch.ops.aten
prims = torch.ops.prims


def value(node: fx.Node) -> Any:
    """Return the fake value of a node: AOTAutograd's ``val``, or Dynamo's ``example_value``."""
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Return the shape of a tensor node; sizes are ints or SymInts."""
    return tuple(value(node).shape)


def outputs(graph: fx.Graph) -> list[Any]:
    """Return the output values of a graph (nodes, numbers or None) as a flat list."""
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def set_output(graph: fx.Graph, position: int, node: fx.Node | None) -> None:
    """Put ``node`` at ``position`` of the graph's outputs."""
    output = graph.output_node()
    values = outputs(graph)
    values[position] = node
    output.args = (tuple(values),)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph so that the copy can be changed; fake values are shared, node names are kept."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    graph.output_node().meta = copy.copy(gm.graph.output_node().meta)
    return fx.GraphModule(gm, graph)


def copy_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph of Dynamo so that the copy can be changed: Dynamo reads its own after the backend has returned."""
    copied = copy_graph(gm)
    copy_dynamo_attributes(gm, copied)
    for node in copied.graph.nodes:
        node.meta.pop("grapharg", None)  # Dynamo's handle on the real input, which a kept graph must not keep
    return copied


def dependents(sources: Iterable[fx.Node]) -> set[fx.Node]:
    """Return all nodes that are computed from ``sources``, these included."""
    found = set(sources)
    pending = list(found)
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return all nodes that ``nodes`` are computed from, these included."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def insert_after(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert ``target(*args, **kwargs)`` behind ``node``, or behind the inputs where ``node`` is one of them."""
    arguments, sizes = _with_sizes_as_nodes(graph, args, kwargs)
    point = list(graph.find_nodes(op="placeholder"))[-1] if node.op == "placeholder" else node
    with graph.inserting_after(max(point, *sizes) if sizes else point):
        return _finish(graph.call_function(target, *arguments), node)


def insert_before(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert ``target(*args, **kwargs)`` in front of ``node``."""
    arguments, _ = _with_sizes_as_nodes(graph, args, kwargs)
    with graph.inserting_before(node):
        return _finish(graph.call_function(target, *arguments), node)


def _with_sizes_as_nodes(graph: fx.Graph, args: Any, kwargs: Any) -> tuple[Any, list[fx.Node]]:
    """Arguments with each size that is a symbol as a node that has it, and those nodes.

    Generated code knows a symbol only where an input of the graph has it. One that no input has becomes a number, on
    which torch then guards.
    """
    found: list[fx.Node] = []

    def as_node(argument: Any) -> Any:
        if not isinstance(argument, torch.SymInt):
            return argument
        node = _node_of_size(graph, argument)
        if node is None:
            return int(argument)
        found.append(node)
        return node

    return fx.node.map_aggregate((args, kwargs), as_node), found


def _node_of_size(graph: fx.Graph, size: torch.SymInt) -> fx.Node | None:
    placeholders = list(graph.find_nodes(op="placeholder"))
    for node in placeholders:
        if isinstance(value(node), torch.SymInt) and statically_known_true(value(node) == size):
            return node
    for node in placeholders:
        sizes = shape(node) if isinstance(value(node), torch.Tensor) else ()
        for dim, of_input in enumerate(sizes):
            if isinstance(of_input, torch.SymInt) and statically_known_true(of_input == size):
                with graph.inserting_after(placeholders[-1]):
                    new = graph.call_function(aten.sym_size.int, (node, dim))
                new.meta["val"] = size
                return new
    return None


def _finish(new: fx.Node, neighbour: fx.Node) -> fx.Node:
    new.meta["val"] = run_on_values(new)
    for key in ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id"):
        # The last two are the tags of a checkpointed region: what is computed there is recomputed there.
        if key in neighbour.meta:
            new.meta[key] = neighbour.meta[key]
    return new


def run_on_values(node: fx.Node) -> Any:
    """Run a node's operator on the fake values of its inputs. Nothing is computed and no guard is added."""
    arguments: Any = fx.node.map_arg((node.args, node.kwargs), value)
    args, kwargs = arguments
    if node.target is operator.getitem:
        return args[0][args[1]]
    with unguarded_fake_mode(value(source) for source in node.all_input_nodes):
        return node.target(*args, **kwargs)  # type: ignore[operator]
