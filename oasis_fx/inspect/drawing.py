"""What a drawing of a graph shows: boxes, and arrows between them; for Graphviz and for SVG."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from oasis_fx.graph.edits import value
from oasis_fx.inspect.graphs import GraphSet
from oasis_fx.inspect.nodes import NodeFacts
from oasis_fx.inspect.printing import describe, operator_name
from oasis_fx.memory.node_costs import is_matmul, readable_bytes, viewed


@dataclass(frozen=True)
class Box:
    """One node of a graph as a drawing shows it.

    Attributes:
        name: as printed; the key of the box.
        title, detail: its two lines: operator, mark and the module of the weight, or what an input is; type, shape and
            bytes.
        hint: the rest: module and line.
        role: ``"view"``, ``"item"`` of several results, ``"matmul"`` (attention and convolutions too), ``"other"``; of
            an input, what it is, as in `oasis_fx.inspect.nodes.NodeFacts.part`.
        half: ``"forward"`` or ``"backward"``; of an input, that of what reads it first.
        kind: ``"node"``, ``"input"``, or ``"outside"`` for a value from elsewhere.
        mark: as in `oasis_fx.inspect.nodes.NodeFacts`.
        saved: for the backward pass.
    """

    name: str
    title: str
    detail: str
    hint: str
    role: str
    half: str
    kind: str
    mark: str
    saved: bool


@dataclass(frozen=True)
class Arrow:
    """An arrow from a box to one that reads it; ``crossing`` if it goes from the forward to the backward half."""

    source: str
    target: str
    crossing: bool


@dataclass(frozen=True)
class Drawing:
    """Boxes in the order of the graph, and the arrows between them."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def draw(shown: GraphSet, which: str, only: str | None = None) -> Drawing:
    """Draw a box for each node of a graph; with ``only``, for each that belongs to it and for what these read."""
    facts = shown.facts(which)
    body = shown.nodes(which, only)
    drawn = [node for node in body if node.op != "placeholder"]
    halves = {node: _half(facts[node.name], which) for node in drawn}
    if which == "backward":
        halves |= {node: "forward" for node in body if node.op == "placeholder" and facts[node.name].saved}
    inside = set(body)
    for node in drawn:
        for source in node.all_input_nodes:
            halves.setdefault(source, halves[node])
    order = {node: index for index, node in enumerate(shown.module(which).graph.nodes)}
    boxes = [
        _box(node, shown, facts[node.name], halves[node], node in inside)
        for node in sorted(halves, key=order.__getitem__)
    ]
    arrows = [
        Arrow(shown.names[source.name], shown.names[node.name], halves[source] != halves[node])
        for node in drawn
        for source in node.all_input_nodes
    ]
    return Drawing(tuple(boxes), tuple(arrows))


def _half(facts: NodeFacts, which: str) -> str:
    return "backward" if which == "backward" or facts.part == "backward" else "forward"


def _box(node: fx.Node, shown: GraphSet, facts: NodeFacts, half: str, inside: bool) -> Box:
    is_input = node.op == "placeholder"
    if is_input:
        title = facts.weights[0] if facts.part == "weight" else facts.part
    else:
        of_one = facts.mark == "+G" or (facts.mark == "-" and facts.weights)
        mark = facts.mark if len(facts.mark) > 1 else ""
        title = " ".join(filter(None, (operator_name(node), mark, module_of(facts.weights[0]) if of_one else "")))
    size = readable_bytes(facts.num_bytes) if facts.num_bytes else ""
    hint = ", ".join(filter(None, (shown.names[node.name], facts.module, facts.line)))
    kind = "input" if is_input else "node" if inside else "outside"
    detail = " ".join(filter(None, (describe(value(node)), size)))
    role = facts.part if is_input else _role(node)
    return Box(shown.names[node.name], title, detail, hint, role, half, kind, facts.mark, facts.saved)


def _role(node: fx.Node) -> str:
    if viewed(node) is not None:
        return "view"
    if node.target is operator.getitem:
        return "item"
    return "matmul" if is_matmul(node) else "other"


def module_of(weight: str) -> str:
    """Return the last step of the path to a weight's module: ``q_proj`` of ``layers.0.q_proj.weight``; may be empty."""
    return weight.rpartition(".")[0].rpartition(".")[2]
