"""The graphs that the passes made of one compiled graph, under common names, for the printer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from oasis_fx.lowering import CompiledGraph
from oasis_fx.pipeline import Trace
from oasis_fx.printing import number_nodes, print_graph
from oasis_fx.torch_private import input_placeholders

GRAPHS = ("before", "after", "forward", "backward")
_TITLES = {"before": "joint", "after": "joint"}  # one title, or a diff would start with a difference


@dataclass(frozen=True)
class GraphSet:
    """One compiled graph before and after the passes, and its two partitions.

    Attributes:
        before, after: the joint graph.
        forward, backward: the partitions of ``after``.
        names: printed names by node name, common to the four.
    """

    before: fx.GraphModule
    after: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule
    names: dict[str, str] = field(repr=False)

    def text(self, which: str) -> str:
        """One of the graphs as Python.

        Raises:
            ValueError: unless ``which`` is ``"before"``, ``"after"``, ``"forward"`` or ``"backward"``.
        """
        if which not in GRAPHS:
            raise ValueError(f"graph is {which!r}: it must be one of {', '.join(map(repr, GRAPHS))}")
        return print_graph(getattr(self, which), title=_TITLES.get(which, which), names=self.names)

    def __str__(self) -> str:
        return "\n\n".join(f"# {which}\n{self.text(which)}" for which in GRAPHS)


def graphs(records: Sequence[CompiledGraph]) -> list[GraphSet]:
    """The graphs of each record that has a weight in a subspace; the others went to the inner compiler as they were."""
    return [_graph_set(record, trace) for record in records if (trace := trace_of(record)) is not None]


def trace_of(record: CompiledGraph) -> Trace | None:
    """What the passes did to a graph, run again where a compile cache had the result; None without any group."""
    if record.trace is None and record.retrace is not None:
        record.trace = record.retrace()
    return record.trace


def _graph_set(record: CompiledGraph, trace: Trace) -> GraphSet:
    placeholders = input_placeholders(trace.before.graph)
    labels = {placeholders[at].name: name for at, name in sorted(record.names.items()) if at in placeholders}
    for kind in ("basis", "energy", "slot"):
        for index, position in enumerate(sorted({getattr(weight, kind) for weight in record.lifted} - {None})):
            labels[placeholders[position].name] = f"{kind}_{index}"
    modules = trace.before, trace.after, trace.forward, trace.backward
    return GraphSet(*modules, number_nodes([gm.graph for gm in modules], labels))
