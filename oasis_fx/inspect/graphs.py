"""The graphs that the passes made of one compiled graph, under common names, for the printer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from oasis_fx._torch.compiler import functorch_config
from oasis_fx._torch.joint_graphs import gradient_positions, input_placeholders, is_whole_joint
from oasis_fx.compile.joint import Trace
from oasis_fx.compile.lowering import CompiledGraph
from oasis_fx.compile.partition import torch_min_cut_later
from oasis_fx.graph.edits import copy_graph, outputs
from oasis_fx.inspect.nodes import NodeFacts, input_kinds, joint_facts, marks_and_weights, select
from oasis_fx.inspect.printing import number_nodes, print_graph

GRAPHS = ("before", "after", "forward", "backward")
_TITLES = {"before": "joint", "after": "joint"}  # one title, or a diff would start with a difference


@dataclass(frozen=True)
class GraphSet:
    """One compiled graph before and after the passes, and its two halves.

    Attributes:
        before, after: the joint graph.
        forward, backward: the two halves of ``after``.
        names: printed names by node name, common to the four.
        record: what the backend keeps of the compiled graph.
        trace: what the passes did to it.
    """

    before: fx.GraphModule
    after: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule
    names: dict[str, str] = field(repr=False)
    record: CompiledGraph = field(repr=False)
    trace: Trace = field(repr=False)

    def text(self, which: str, *, only: str | None = None, notes: bool = True) -> str:
        """Print one of the graphs as Python.

        Args:
            only: show what belongs to a module or weight, given by its name, the end of its path or a glob.
            notes: with comments: sizes in bytes, the user's lines, what is saved, what the passes did.

        Raises:
            ValueError: unless ``which`` is ``"before"``, ``"after"``, ``"forward"`` or ``"backward"``.
        """
        gm = self.module(which)
        title = _TITLES.get(which, which)
        if not notes and only is None:
            return print_graph(gm, title=title, names=self.names)
        facts, labels = self.facts(which), self._output_labels(gm.graph, which)
        body = None if only is None else self.nodes(which, only)
        text = print_graph(gm, title=title, names=self.names, facts=facts, labels=labels, body=body)
        head = f"# Only {only}: values from elsewhere are arguments, values that go elsewhere are returned.\n"
        return text if only is None else head + text

    def module(self, which: str) -> fx.GraphModule:
        """Return the graph module of that name.

        Raises:
            ValueError: there is none.
        """
        if which not in GRAPHS:
            raise ValueError(f"graph is {which!r}: it must be one of {', '.join(map(repr, GRAPHS))}")
        return getattr(self, which)

    def nodes(self, which: str, only: str | None = None) -> list[fx.Node]:
        """Return the nodes of a graph but its output; with ``only`` those that belong to that module or weight."""
        return select(self.module(which).graph.nodes, self.facts(which), only)

    def facts(self, which: str) -> dict[str, NodeFacts]:
        """Return what is known of the nodes of a graph, by node name."""
        return self._facts_before if which == "before" else self._facts_after

    @cached_property
    def stock(self) -> tuple[fx.Graph, fx.Graph]:
        """The two halves of ``before``: what stock `torch.compile` runs, under torch's settings of now."""
        return stock_halves(self.trace)

    @cached_property
    def _facts_before(self) -> dict[str, NodeFacts]:
        return self._facts(self.before.graph, self.stock)

    @cached_property
    def _facts_after(self) -> dict[str, NodeFacts]:
        return self._facts(self.after.graph, (self.forward.graph, self.backward.graph))

    def _facts(self, joint: fx.Graph, partition: tuple[fx.Graph, fx.Graph]) -> dict[str, NodeFacts]:
        marks, weights = marks_and_weights(self.trace, self.record.names, self.record.lifted)
        kinds = input_kinds(self.trace, self.record.names, self.record.layout)
        return joint_facts(joint, partition, self.trace.num_forward_outputs, marks, weights, kinds)

    def _output_labels(self, graph: fx.Graph, which: str) -> list[str]:
        count = self.trace.num_forward_outputs if which != "backward" else 0
        labels = ["output"] * count + ["saved" if which == "forward" else ""] * (len(outputs(graph)) - count)
        if which != "forward" and is_whole_joint(graph):
            inputs = input_placeholders(self.after.graph)
            for position, output in gradient_positions(graph).items():
                if position in inputs:
                    labels[output] = f"gradient of {self.names[inputs[position].name]}"
        return labels

    def __str__(self) -> str:
        return "\n\n".join(f"# {which}\n{self.text(which)}" for which in GRAPHS)


def stock_halves(trace: Trace, share: float | None = None) -> tuple[fx.Graph, fx.Graph]:
    """Return the forward and the backward graph that stock `torch.compile` would run.

    Args:
        share: of what torch's own partitioner would keep for the backward pass; None: torch's setting of now.
    """
    bounded = nullcontext() if share is None else functorch_config.patch(activation_memory_budget=share)
    with bounded:
        halves = torch_min_cut_later(trace.static_inputs)(copy_graph(trace.before), trace.num_forward_outputs)
    return halves[0].graph, halves[1].graph


def graphs(records: Sequence[CompiledGraph]) -> list[GraphSet]:
    """Return the graphs of each record that has a weight in a subspace; the passes saw no others."""
    return [_graph_set(record, trace) for record in records if (trace := trace_of(record)) is not None]


def views(sets: Sequence[GraphSet], chosen: Sequence[str], only: str | None = None) -> list[tuple[str, GraphSet, str]]:
    """Choose what to show: a title, the set and the name of each graph in ``chosen`` that has a node of ``only``.

    Raises:
        ValueError: no graph has one.
    """
    found = []
    for index, shown in enumerate(sets, 1):
        where = f" of graph {index} of {len(sets)}" if len(sets) > 1 else ""
        found += [(which + where, shown, which) for which in chosen if shown.nodes(which, only)]
    if sets and not found:
        facts = [facts for shown in sets for facts in shown.facts("after").values()]
        modules = sorted({one.module for one in facts} - {""})
        raise ValueError(f"nothing belongs to {only!r}: the modules are {', '.join(modules)}")
    return found


def trace_of(record: CompiledGraph) -> Trace | None:
    """Return what the passes did to a graph; they run once more if a cache had the result. None without any group."""
    if record.trace is None and record.retrace is not None:
        record.trace = record.retrace()
    return record.trace


def _graph_set(record: CompiledGraph, trace: Trace) -> GraphSet:
    placeholders = input_placeholders(trace.before.graph)
    labels = {placeholders[at].name: name for at, name in sorted(record.names.items()) if at in placeholders}
    names = {} if record.layout is None else record.layout.names()
    labels |= {placeholders[at].name: name for at, name in names.items()}
    modules = trace.before, trace.after, trace.forward, trace.backward
    return GraphSet(*modules, number_nodes([gm.graph for gm in modules], labels), record, trace)
