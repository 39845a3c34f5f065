"""Statistics come as soon as they can, and nothing else of a backward graph changes."""

from __future__ import annotations

import torch

import oasis_fx.compile.pipeline as pipeline
from oasis_fx.graph.edits import copy_graph, outputs
from oasis_fx.inspect.graphs import trace_of
from oasis_fx.inspect.tracing import trace_model
from oasis_fx.memory.node_costs import storage_node
from oasis_fx.passes.early_statistics import early_statistics
from oasis_fx.settings import Settings


def test_the_order_changes_and_no_value_does(monkeypatch) -> None:
    def block() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False), torch.nn.Tanh())

    torch.manual_seed(0)
    model = torch.nn.Sequential(block(), block(), block()).double()
    monkeypatch.setattr(pipeline, "early_statistics", lambda gm, facts: facts)
    settings = Settings(rank=2, exclude=(), inner="aot_eager")
    (record,) = trace_model(model, torch.randn(32, 16, dtype=torch.float64), settings)
    trace = trace_of(record)
    assert trace is not None
    late, early = copy_graph(trace.backward), copy_graph(trace.backward)
    early_statistics(early, None)
    early.graph.lint()
    early.recompile()
    assert {node.name for node in late.graph.nodes} == {node.name for node in early.graph.nodes}
    # tanh keeps its result, which the next layer reads: P and C of it are computed in the backward pass.
    returned = {node.name for node in outputs(early.graph) if isinstance(node, torch.fx.Node)}
    statistics = {
        node.name
        for node in early.graph.nodes
        if node.name in returned and node.meta["val"].shape == (16, 2) and not _reads_tangent(node)
    }
    assert len(statistics) >= 2
    spans = [_span(gm.graph, statistics) for gm in (late, early)]
    assert spans[1] < spans[0]
    given = [
        torch.randn(node.meta["val"].shape, dtype=torch.float64) for node in late.graph.find_nodes(op="placeholder")
    ]
    for one, other in zip(late(*given), early(*given), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_the_pipeline_moves_them(monkeypatch) -> None:
    """Each statistic of the backward graph comes right behind the last of its inputs."""
    layers = [layer for _ in range(3) for layer in (torch.nn.Linear(16, 16, bias=False), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers).double()
    settings = Settings(rank=2, exclude=(), inner="aot_eager")
    spans = []
    for pass_of in (early_statistics, lambda gm, facts: facts):
        monkeypatch.setattr(pipeline, "early_statistics", pass_of)
        (record,) = trace_model(model, torch.randn(32, 16, dtype=torch.float64), settings)
        graph = trace_of(record).backward.graph
        returned = {node for node in outputs(graph) if isinstance(node, torch.fx.Node)}
        statistics = {n.name for n in returned if n.meta["val"].shape == (16, 2) and not _reads_tangent(n)}
        assert len(statistics) >= 2
        spans.append(_span(graph, statistics))
    assert spans[0] < spans[1]


def _reads_tangent(node: torch.fx.Node) -> bool:
    return any("tangent" in source.name or _reads_tangent(source) for source in node.all_input_nodes)


def _span(graph: torch.fx.Graph, statistics: set[str]) -> int:
    """How long what the statistics read is held for them."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sum(
        order[node] - order[storage_node(source)]
        for node in graph.nodes
        if node.name in statistics
        for source in node.all_input_nodes
    )


def test_a_node_waits_for_the_last_of_its_inputs() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("primals_1")
    once = graph.call_function(torch.ops.aten.exp.default, (x,))
    twice = graph.call_function(torch.ops.aten.exp.default, (once,))
    statistic = graph.call_function(torch.ops.aten.mm.default, (x, twice))
    graph.output((statistic,))
    early_statistics(torch.fx.GraphModule({}, graph), None)
    graph.lint()
    assert [node for node in graph.nodes if node.op == "call_function"] == [once, twice, statistic]
