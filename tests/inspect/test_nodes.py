"""What is said of nodes: where they are from, what is saved, what the passes did."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import fx

from oasis_fx.cli.targets import load_target
from oasis_fx.inspect.graphs import GRAPHS, graphs, views
from oasis_fx.inspect.node_table import node_table
from oasis_fx.inspect.nodes import source_line, within
from oasis_fx.inspect.tracing import trace_model
from oasis_fx.memory.node_costs import saved_storages, storage_node
from oasis_fx.settings import Settings

BLOCKS = f"{Path(__file__).parent}/two_blocks.py:build"


def shown_blocks(inner="aot_eager", **settings):
    model, inputs = load_target(BLOCKS)
    (shown,) = graphs(trace_model(model, inputs, Settings(rank=2, inner=inner, **settings)))
    return shown


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_marks(inner) -> None:
    shown = shown_blocks(inner)
    after = list(shown.facts("after").values())
    by_mark = {mark: [facts for facts in after if facts.mark == mark] for mark in ("+P", "+C", "+G")}
    weights = [f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("up", "down")]
    for found in by_mark.values():
        assert sorted(w for facts in found for w in facts.weights) == sorted(weights)
        assert all(facts.module == facts.weights[0].removesuffix(".weight") for facts in found)
    assert {facts.part for facts in by_mark["+G"]} == {"backward"}
    assert [facts.num_bytes for facts in by_mark["+P"]] == [8 * 50 * 2] * 4
    before = shown.facts("before")
    removed = [node for node in shown.before.graph.nodes if node.name in before and before[node.name].mark == "-"]
    contractions = [node for node in removed if node.target is torch.ops.aten.mm.default]
    assert len(contractions) == 4 and not any(facts.mark.startswith("+") for facts in before.values())
    assert sorted(before[node.name].weights[0] for node in contractions) == sorted(weights)


def test_places() -> None:
    shown = shown_blocks()
    facts = shown.facts("after")
    by_target = {str(node.target): facts[node.name] for node in shown.after.graph.nodes if node.name in facts}
    assert by_target["aten.sin.default"].line == "two_blocks.py:15 h = torch.sin(self.up(x))"
    assert by_target["aten.sin.default"].module == "layers.1"
    # Backward nodes are from where their forward is.
    assert by_target["aten.cos.default"].line == "two_blocks.py:15 h = torch.sin(self.up(x))"
    assert by_target["aten.cos.default"].part == "backward"
    sums = [node.name for node in shown.after.graph.nodes if node.meta.get("is_gradient_acc")]
    assert [(facts[name].module, facts[name].line) for name in sums] == [("layers.0.down", "")]
    kinds = [facts[node.name].part for node in shown.after.graph.find_nodes(op="placeholder")]
    assert kinds == [
        *("weight", "input", "weight", "weight", "weight", "weight"),
        *["basis"] * 4,
        *["energy"] * 4,
        *["slot"] * 4,
        "incoming gradient",
    ]


def test_a_sum_of_gradients_belongs_where_the_backward_pass_goes_on() -> None:
    model, inputs = load_target(BLOCKS)
    model.layers.append(copy.deepcopy(model.layers[0]))
    (shown,) = graphs(trace_model(model, inputs, Settings(rank=2)))
    sums = [node.name for node in shown.before.graph.nodes if node.meta.get("is_gradient_acc")]
    assert [shown.facts("before")[name].module for name in sums] == ["layers.1.down", "layers.0.down"]


def test_what_is_saved_is_what_the_report_counts() -> None:
    shown = shown_blocks()
    for which, forward in (("before", shown.stock[0]), ("after", shown.forward.graph)):
        saved = [
            node
            for node in shown.module(which).graph.nodes
            if node.op != "output" and shown.facts(which)[node.name].saved
        ]
        owners = {storage_node(node) for node in saved if storage_node(node).op != "placeholder"}
        sizes = {node.name: shown.facts(which)[node.name].num_bytes for node in owners}
        assert sizes == saved_storages(forward, 1) and len(sizes) > 4


def test_within() -> None:
    assert within("model.layers.3.mlp.up_proj", "layers.3") and within("layers.3", "layers.3")
    assert not within("model.layers.30.mlp", "layers.3") and not within("layers", "layers.3")
    assert within("model.layers.3.mlp.up_proj", "mlp") and within("model.layers.3.mlp.up_proj", "layers.*.mlp")


@pytest.mark.parametrize("which", GRAPHS)
def test_only_a_module_or_a_weight(which) -> None:
    shown = shown_blocks()
    facts = shown.facts(which)
    chosen = shown.nodes(which, "layers.1")
    assert chosen and len(chosen) < len(shown.nodes(which))
    assert all(
        facts[node.name].module.startswith("layers.1") or facts[node.name].weights[0].startswith("layers.1")
        for node in chosen
    )
    of_weight = shown.nodes("after", "layers.1.up.weight")
    assert {facts.mark for facts in (shown.facts("after")[node.name] for node in of_weight)} == {
        "",
        "+",
        "+P",
        "+C",
        "+E",
        "+G",
    }
    assert shown.nodes(which, "layers.2") == []


def test_graphs_without_a_node_of_a_module_are_left_out() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.sin(self.a(x))
            torch._dynamo.graph_break()
            return self.b(x)

    sets = graphs(trace_model(Twice(), torch.randn(3, 4), Settings(rank=2)))
    assert len(sets) == 2
    assert [title for title, *_ in views(sets, GRAPHS[2:])] == [
        *("forward of graph 1 of 2", "backward of graph 1 of 2"),
        *("forward of graph 2 of 2", "backward of graph 2 of 2"),
    ]
    assert {title[-6:] for title, *_ in views(sets, GRAPHS, "b")} == {"2 of 2"}
    with pytest.raises(ValueError, match=r"nothing belongs to 'c': the modules are a, b$"):
        views(sets, GRAPHS, "c")


def test_lines_of_torch_are_not_the_users() -> None:
    node = fx.Graph().placeholder("x")
    frame = '  File "{}", line {}, in forward\n    {}\n'
    library = torch.nn.functional.__file__
    node.meta["stack_trace"] = (
        frame.format("/a/b.py", 3, "y = f(x)") + "    ^^^^\n" + frame.format(library, 9, "return g(x)")
    )
    assert source_line(node) == "b.py:3 y = f(x)"
    node.meta["stack_trace"] = frame.format(library, 9, "return g(x)")
    assert source_line(node) == ""


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_size_that_depends_on_data_counts_as_none() -> None:
    class Chosen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.sin(self.a(x))
            return self.b(h[(h.sum(1) > -100).nonzero().squeeze(1)])

    (shown,) = graphs(trace_model(Chosen(), torch.randn(6, 4), Settings(rank=2)))
    text = shown.text("after")
    assert "[u0, 4]" in text
    (row,) = [row for row in node_table(shown, "after").rows if row[2] == "[u0, 4]" and row[1].startswith("aten.addmm")]
    assert row[4] == "-"
