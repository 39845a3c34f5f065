"""A graph as a table, one row a node."""

from __future__ import annotations

import operator
from typing import Any

import torch
from tabulate import tabulate
from torch import fx

from oasis_fx.cost import readable_bytes
from oasis_fx.graph import value
from oasis_fx.graphs import GraphSet
from oasis_fx.nodes import NodeFacts
from oasis_fx.printing import describe

HEADERS = ("name", "operator", "shape", "dtype", "bytes", "part", "saved", "mark", "from")


def format_nodes(shown: GraphSet, which: str, only: str | None = None) -> str:
    """The rows of `node_rows` as text."""
    align = ["right" if header == "bytes" else "left" for header in HEADERS]
    rows = node_rows(shown, which, only)
    return tabulate(rows, headers=HEADERS, tablefmt="simple", disable_numparse=True, colalign=align if rows else None)


def node_rows(shown: GraphSet, which: str, only: str | None = None) -> list[tuple[str, ...]]:
    """A text for each of `HEADERS`, for each node of a graph that belongs to ``only``."""
    facts = shown.facts(which)
    return [_row(shown.names[node.name], node, facts[node.name]) for node in shown.nodes(which, only)]


def operator_text(node: fx.Node, facts: NodeFacts) -> str:
    """What a node calls, such as ``aten.mm.default``; of an input, what it is."""
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
    origin = facts.line or (f"module {facts.module}" if facts.module else "")
    saved = "saved" if facts.saved else ""
    return name, operator_text(node, facts), shape, dtype, size, part, saved, facts.mark, origin
