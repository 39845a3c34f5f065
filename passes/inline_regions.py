"""Put the bodies of `torch.compiler.nested_compile_region` into the graph that calls them.

    before   invoke_subgraph(body, "id", x, W1, b1)     the body is partitioned by itself: no basis among its inputs
    after    linear(x, W1, b1) ...                      what it computes, once for each call

A region is compiled once for all its calls, and that time is given up where it reads weights that may be trained in a
subspace: each call has bases of its own. Regions that read no weight are left alone.
"""

from __future__ import annotations

import operator
from typing import Any, TypeVar

import torch
from torch import fx

from oasis_fx._torch.dynamo_graphs import copy_input_sources
from oasis_fx.graph.edits import value

Facts = TypeVar("Facts")


def inline_regions(gm: fx.GraphModule, facts: Facts) -> Facts:
    """Change ``gm`` so that no region reads a trainable weight; return ``facts`` as they are.

    Args:
        gm: a copy of a graph of Dynamo.
    """
    if any(_is_region(node) and _reads_weights(node) for node in gm.graph.nodes):
        graph = fx.Graph()
        graph.output(_copy(gm, graph, {}, gm))
        copy_input_sources(gm.graph, graph)
        gm.graph = graph
        read = {str(node.target).split(".")[0] for node in graph.find_nodes(op="get_attr")}
        for name in [name for name, _ in gm.named_children() if name not in read]:
            delattr(gm, name)  # the body of a region that is in the graph now
    return facts


def _is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.higher_order.invoke_subgraph


def _reads_weights(node: fx.Node) -> bool:
    given = [value(source) for source in node.all_input_nodes]
    return any(isinstance(one, torch.nn.Parameter) and one.dim() >= 2 and one.requires_grad for one in given)


def _copy(gm: fx.GraphModule, graph: fx.Graph, known: dict[fx.Node, Any], root: torch.nn.Module) -> Any:
    """Copy the nodes of ``gm`` into ``graph``, whose attributes go to ``root``. Return what ``gm`` returns.

    Args:
        known: what stands for the placeholders of ``gm``; gets what stands for its other nodes.
    """
    for node in gm.graph.nodes:
        if node.op == "output":
            return fx.node.map_arg(node.args[0], lambda n: known[n])
        if node in known:
            continue
        if _is_region(node):
            body = getattr(gm, str(node.args[0].target))  # type: ignore[union-attr]
            given = [known[a] if isinstance(a, fx.Node) else a for a in node.args[2:]]
            inside = dict(zip(body.graph.find_nodes(op="placeholder"), given, strict=True))
            known[node] = _copy(body, graph, inside, root)
        elif node.target is operator.getitem and isinstance(known.get(node.args[0]), tuple | list):  # type: ignore
            known[node] = known[node.args[0]][node.args[1]]  # type: ignore[index]  # a result of a region
        elif node.op == "get_attr":
            name = f"{str(node.target).replace('.', '_')}_{len(known)}_{len(graph.nodes)}"
            setattr(root, name, _attribute(gm, str(node.target)))
            known[node] = graph.get_attr(name)
            known[node].meta = dict(node.meta)
        else:
            known[node] = graph.node_copy(node, lambda n: known[n])
    raise AssertionError("a graph without an output")


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part)
    return found
