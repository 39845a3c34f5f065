"""The comments of a printed graph: its parts, the user's lines, and what is saved, added or removed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import dropwhile

from torch import fx

from oasis_fx.compile.names import relative_name
from oasis_fx.graph.runtime_inputs import RUNTIME_INPUTS
from oasis_fx.inspect.nodes import NodeFacts, first_backward_node
from oasis_fx.memory.node_costs import readable_bytes, storage_node


class Notes:
    """Comments on nodes of one graph, asked for in the order of the text; all empty where there are no facts.

    Args:
        facts: by node name.
        names: printed names by node.
        body: the nodes that the text shows.
    """

    def __init__(
        self,
        graph: fx.Graph,
        facts: Mapping[str, NodeFacts],
        names: Mapping[fx.Node, str],
        body: Sequence[fx.Node],
    ) -> None:
        self._facts = facts
        self._names = names
        first = first_backward_node(graph)
        self._backward = set(dropwhile(lambda node: node is not first, graph.nodes))
        made = [node for node in graph.nodes if node.op == "call_function" and self._is_saved(node)]
        self._saved = [node for node in body if self._is_saved(node)] if made else []
        self._is_joint = bool(made) and first is not None
        self._part = ""
        self._place = ("", "")

    def behind(self, node: fx.Node) -> str:
        """Return the comment behind an argument or a statement: its size, and what is not as usual with it."""
        facts = self._facts.get(node.name)
        if facts is None:
            return ""
        found = [readable_bytes(facts.num_bytes)] if facts.num_bytes else []
        if facts.part in RUNTIME_INPUTS:
            first, *others = facts.weights
            found.append(f"{facts.part} of {', '.join([first, *(relative_name(name, first) for name in others)])}")
        elif facts.part == "incoming gradient":
            found.append(facts.part)
        if facts.saved:
            found.append("saved")
        if facts.part == "both":
            found.append("recomputed in backward")
        elif facts.part == "backward" and self._is_joint and node not in self._backward:
            found.append("moved to backward")
        if facts.mark:
            found.append(f"+G of {facts.weights[0]}" if facts.mark == "+G" and facts.weights else facts.mark)
        return f"  # {', '.join(found)}" if found else ""

    def ahead(self, node: fx.Node) -> Iterator[str]:
        """Yield the comments ahead of a statement, where another part of the graph or line of the user's begins."""
        facts = self._facts.get(node.name)
        if facts is None:
            return
        part = "backward" if node in self._backward else "forward"
        if part != self._part and self._is_joint:
            if part == "backward":
                yield from self.saved()
            yield f"# ---- {part}"
            self._part, self._place = part, ("", "")
        if (facts.module, facts.line) != self._place and (facts.module or facts.line):
            self._place = (facts.module, facts.line)
            module = f"module {facts.module}" if facts.module else ""
            yield f"# {', '.join(filter(None, (module, facts.line)))}"

    def saved(self) -> Iterator[str]:
        """Yield what is saved for the backward pass, at the first call only."""
        if self._saved:
            owners = {storage_node(node): node for node in self._saved}
            total = sum(self._facts[node.name].num_bytes for node in owners if node.op != "placeholder")
            yield f"# ---- saved for backward: {readable_bytes(total)}, inputs aside"
            names = ", ".join(self._names[node] for node in self._saved)
            yield from textwrap.wrap(names, 110, initial_indent="# ", subsequent_indent="# ")
        self._saved = []

    def _is_saved(self, node: fx.Node) -> bool:
        return node.name in self._facts and self._facts[node.name].saved


def returned(texts: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return the lines of a return statement with a comment behind each value."""
    lines = [f"    {text},  # {label}" if label else f"    {text}," for text, label in zip(texts, labels, strict=True)]
    return ["return (", *lines, ")"]
