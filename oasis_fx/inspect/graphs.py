"""The graphs that the passes made of one compiled graph, under common names, for the printer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from functorch.compile import min_cut_rematerialization_partition
from torch import fx

from oasis_fx._torch.compiler import gradient_positions, input_placeholders, is_whole_joint, unguarded_fake_mode
from oasis_fx.compile.lowering import CompiledGraph
from oasis_fx.compile.pipeline import Trace, copy_graph
from oasis_fx.graph.edits import outputs, value
from oasis_fx.inspect.nodes import NodeFacts, input_kinds, joint_facts, marks_and_weights, select
from oasis_fx.inspect.printing import number_nodes, print_graph

GRAPHS = ("before", "after", "forward", "backward")
_TITLES = {"before": "joint", "after": "joint"}  # one title, or a diff would start with a difference


@dataclass(frozen=True)
class GraphSet:
    """One compiled graph before and after the passes, and its two partitions.

    Attributes:
        before, after: the joint graph.
        forward, backward: the partitions of ``after``.
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
        """One of the graphs as Python.

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
        """The graph module of that name; ValueError where there is none."""
        if which not in GRAPHS:
            raise ValueError(f"graph is {which!r}: it must be one of {', '.join(map(repr, GRAPHS))}")
        return getattr(self, which)

    def nodes(self, which: str, only: str | None = None) -> list[fx.Node]:
        """The nodes of a graph but its output; with ``only`` those that belong to that module or weight."""
        return select(self.module(which).graph.nodes, self.facts(which), only)

    def facts(self, which: str) -> dict[str, NodeFacts]:
        """What is known of the nodes of a graph, by node name."""
        return self._facts_before if which == "before" else self._facts_after

    @cached_property
    def stock(self) -> tuple[fx.Graph, fx.Graph]:
        """The partitions of ``before``: what stock `torch.compile` runs, under torch's settings of now."""
        forward, backward = partition_by_torch(self.trace, copy_graph(self.before), self.trace.num_forward_outputs)
        return forward.graph, backward.graph

    @cached_property
    def _facts_before(self) -> dict[str, NodeFacts]:
        return self._facts(self.before.graph, self.stock)

    @cached_property
    def _facts_after(self) -> dict[str, NodeFacts]:
        return self._facts(self.after.graph, (self.forward.graph, self.backward.graph))

    def _facts(self, joint: fx.Graph, partition: tuple[fx.Graph, fx.Graph]) -> dict[str, NodeFacts]:
        marks, weights = marks_and_weights(self.trace, self.record.names, self.record.lifted)
        kinds = input_kinds(self.trace, self.record.names, self.record.lifted)
        return joint_facts(joint, partition, self.trace.num_forward_outputs, marks, weights, kinds)

    def _output_labels(self, graph: fx.Graph, which: str) -> list[str]:
        count = self.trace.num_forward_outputs if which != "backward" else 0
        labels = ["output"] * count + ["saved" if which == "forward" else ""] * (len(outputs(graph)) - count)
        if which != "forward" and is_whole_joint(graph):
            inputs = input_placeholders(self.after.graph)
            for position, slot in gradient_positions(graph).items():
                if position in inputs:
                    labels[slot] = f"gradient of {self.names[inputs[position].name]}"
        return labels

    def __str__(self) -> str:
        return "\n\n".join(f"# {which}\n{self.text(which)}" for which in GRAPHS)


def partition_by_torch(
    trace: Trace, joint: fx.GraphModule, num_forward_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Partition a joint graph of a trace, which changes it, by torch's settings of now and outside of its compile."""
    with unguarded_fake_mode(value(node) for node in joint.graph.nodes):  # random states get fake values in it
        return min_cut_rematerialization_partition(
            joint,
            None,
            num_fwd_outputs=num_forward_outputs,
            static_lifetime_input_indices=list(trace.static_inputs),
        )


def graphs(records: Sequence[CompiledGraph]) -> list[GraphSet]:
    """The graphs of each record that has a weight in a subspace; the others went to the inner compiler as they were."""
    return [_graph_set(record, trace) for record in records if (trace := trace_of(record)) is not None]


def views(sets: Sequence[GraphSet], chosen: Sequence[str], only: str | None = None) -> list[tuple[str, GraphSet, str]]:
    """What to show: a title, the set and the name of each chosen graph, less those without a node of ``only``.

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
    """What the passes did to a graph, run again where a compile cache had the result; None without any group."""
    if record.trace is None and record.retrace is not None:
        record.trace = record.retrace()
    return record.trace


def _graph_set(record: CompiledGraph, trace: Trace) -> GraphSet:
    placeholders = input_placeholders(trace.before.graph)
    labels = {placeholders[at].name: name for at, name in sorted(record.names.items()) if at in placeholders}
    for kind in ("basis", "energy", "control", "slot"):
        for index, position in enumerate(sorted({getattr(weight, kind) for weight in record.lifted} - {None})):
            labels[placeholders[position].name] = f"{kind}_{index}"
    modules = trace.before, trace.after, trace.forward, trace.backward
    return GraphSet(*modules, number_nodes([gm.graph for gm in modules], labels), record, trace)
