"""A graph as a table, one row a node."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from oasis_fx.graph.edits import value
from oasis_fx.inspect.graphs import GraphSet
from oasis_fx.inspect.nodes import NodeFacts
from oasis_fx.inspect.printing import describe
from oasis_fx.inspect.report_table import Table
from oasis_fx.memory.node_costs import readable_bytes

_HEADERS = ("name", "operator", "shape", "dtype", "bytes", "part", "saved", "mark", "module", "line")


def node_table(shown: GraphSet, which: str, only: str | None = None) -> Table:
    """Make a table of the nodes of a graph, or of those that belong to ``only``."""
    facts = shown.facts(which)
    rows = [_row(shown.names[node.name], node, facts[node.name]) for node in shown.nodes(which, only)]
    return Table(_HEADERS, rows, (_HEADERS.index("bytes"),))


def _operator(node: fx.Node, facts: NodeFacts) -> str:
    if node.op == "placeholder":
        return facts.part
    if getattr(operator, getattr(node.target, "__name__", ""), None) is node.target:
        return str(node.target.__name__)  # type: ignore[union-attr]
    return str(node.target)


def _row(name: str, node: fx.Node, facts: NodeFacts) -> tuple[str, ...]:
    found: Any = value(node)
    text = describe(found)
    shape, dtype = text, "-"
    if isinstance(found, torch.Tensor):
        dtype, _, shape = text.partition("[")
        shape = f"[{shape}"
    size = readable_bytes(facts.num_bytes) if facts.num_bytes else "-"
    part = "input" if node.op == "placeholder" else facts.part
    saved = "saved" if facts.saved else ""
    return name, _operator(node, facts), shape, dtype, size, part, saved, facts.mark, facts.module, facts.line
