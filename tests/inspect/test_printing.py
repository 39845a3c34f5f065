"""Printed graphs are programs: they run, give the same numbers, and change only where a pass changed them."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from oasis_fx.cli.targets import load_target
from oasis_fx.inspect.diff import side_by_side, wants_color
from oasis_fx.inspect.graphs import GRAPHS, graphs
from oasis_fx.inspect.node_table import node_table
from oasis_fx.inspect.printing import number_nodes, print_graph
from oasis_fx.inspect.report import report
from oasis_fx.inspect.tracing import trace_model
from oasis_fx.settings import Settings
from tests import tiny_llama

TITLES = {"before": "joint", "after": "joint", "forward": "forward", "backward": "backward"}


def mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double(), torch.randn(
        5, 6
    ).double()


def llama():
    torch.manual_seed(0)
    tokens = torch.randint(tiny_llama.VOCABULARY, (2, 10))
    return tiny_llama.llama(num_hidden_layers=1).double(), {"input_ids": tokens, "labels": tokens}


def traced(make, **settings):
    model, inputs = make()
    (shown,) = graphs(trace_model(model, inputs, Settings(rank=2, **settings)))
    return shown


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_golden_texts(inner, golden) -> None:
    shown = traced(mlp, inner=inner)
    for which in GRAPHS:
        golden(f"mlp-{inner}-{which}", shown.text(which))


def blocks():
    return load_target(f"{Path(__file__).parent}/two_blocks.py:build")


def test_golden_texts_with_lines_of_the_user(golden) -> None:
    shown = traced(blocks)
    golden("blocks-after", shown.text("after"))
    golden("blocks-before-only", shown.text("before", only="layers.0"))
    golden("blocks-after-table", f"{node_table(shown, 'after', 'layers.1')}\n")


def random_inputs(gm: fx.GraphModule, **given: torch.Tensor) -> list[torch.Tensor]:
    inputs = []
    generator = torch.Generator().manual_seed(0)
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.name in given:
            inputs.append(given[node.name])
            continue
        fake = node.meta["val"]
        elements = 1 + sum((size - 1) * stride for size, stride in zip(fake.shape, fake.stride(), strict=True))
        if fake.is_floating_point():
            memory = torch.randn(elements, dtype=fake.dtype, generator=generator)
        else:
            memory = torch.randint(0, 2, (elements,), generator=generator).to(fake.dtype)
        inputs.append(memory.as_strided(fake.shape, fake.stride()))
    return inputs


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of each node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)

    def values(self, names) -> dict[str, Any]:
        self.run(*random_inputs(self.module))
        return {names[node.name]: found for node, found in self.env.items() if node.op != "output"}


def run_text(text: str, title: str, *given):
    scope: dict = {}
    exec(text, scope)
    return scope[title](*given)


def same(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("notes", [True, False], ids=["notes", "plain"])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("make", [mlp, llama], ids=["mlp", "llama"])
def test_the_text_runs_and_gives_the_same_numbers(make, inner, notes) -> None:
    shown = traced(make, inner=inner)
    for which in GRAPHS:
        gm = shown.module(which)
        inputs = random_inputs(gm)
        text = shown.text(which, notes=notes)
        assert ("  # " in text) == notes
        given = [gm, *inputs] if "    self,\n" in text else inputs
        same(run_text(text, TITLES[which], *given), fx.Interpreter(gm).run(*inputs))


def dropped():
    class Dropped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.drop = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6), torch.nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(lambda h: self.down(self.drop(self.up(h).tanh())), x, use_reentrant=False)

    torch.manual_seed(0)
    return Dropped().double(), torch.randn(5, 6).double()


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_checkpointed_dropout_is_printed_and_explained(inner) -> None:
    records = trace_model(*dropped(), Settings(rank=2, inner=inner))
    (row, other) = report(records)[0].rows
    assert {row.name, other.name} == {"up.weight", "down.weight"}
    (shown,) = graphs(records)
    for which in GRAPHS:
        gm = shown.module(which)
        # A random state is what torch makes of one; a random tensor would be refused.
        state = torch.random.get_rng_state()
        inputs = random_inputs(gm, rng_state_output_0=state)
        torch.manual_seed(3)
        found = run_text(shown.text(which), TITLES[which], *inputs)
        torch.manual_seed(3)
        same(found, gm(*inputs))


@pytest.mark.parametrize("make", [blocks, llama], ids=["blocks", "llama"])
def test_the_text_of_a_module_runs_on_what_it_takes_from_elsewhere(make) -> None:
    shown = traced(make)
    for which in GRAPHS:
        text = shown.text(which, only="layers.0")
        values = Recorder(shown.module(which)).values(shown.names)
        (function,) = ast.parse(text).body[-1:]
        assert isinstance(function, ast.FunctionDef)
        returned = function.body[-1].value
        assert returned.elts and text.startswith("# Only layers.0")
        inside = {shown.names[node.name] for node in shown.nodes(which, "layers.0") if node.op != "placeholder"}
        outside = [n for n in shown.module(which).graph.nodes if shown.names.get(n.name) not in inside]
        read = {shown.names[source.name] for node in outside for source in node.all_input_nodes}
        assert {name.id for name in returned.elts} == read & inside
        found = run_text(text, TITLES[which], *(values[argument.arg] for argument in function.args.args))
        same(found, [values[name.id] for name in returned.elts])


def test_names_are_kept_from_graph_to_graph() -> None:
    shown = traced(mlp)
    before, after = (shown.text(which, notes=False).splitlines() for which in ("before", "after"))
    # The dense contraction of each weight goes, what the passes insert comes, nothing else changes.
    gone, come = [x for x in before if x not in after], [x for x in after if x not in before]
    known = ("permute", " mm", " mul", " sum", "return")
    assert all(any(word in line for word in known) for line in gone + come)
    assert len(gone) < 8


def test_names_are_identifiers() -> None:
    gm = fx.symbolic_trace(torch.nn.Sequential(torch.nn.ReLU()))
    graph = fx.Graph()
    x = graph.placeholder("x")
    total = graph.call_function(torch.ops.aten.sum.default, (x,))
    endless = graph.call_function(torch.ops.aten.add.Tensor, (total, float("inf")), {"alpha": 1})
    graph.output((endless, None))
    names = number_nodes([graph], {"x": "0.lambda", total.name: "lambda"})
    text = print_graph(fx.GraphModule(gm, graph), names=names)
    scope: dict = {}
    exec(text, scope)
    assert scope["graph"](torch.ones(2))[0] == float("inf") and "float('inf')" in text
    assert "_0_lambda," in text and "lambda_1 = aten.sum" in text


def test_side_by_side() -> None:
    before, after = "a\nb\nc\nlong " + "x" * 100, "a\nB\nc\nnew\nlong " + "x" * 100
    text = side_by_side(before, after, width=43)
    lines = text.splitlines()
    assert lines[0] == "a" + " " * 22 + "a"
    assert lines[1].split() == ["b", "|", "B"] and lines[3].split() == [">", "new"]
    assert lines[4].split()[1].endswith("...") and max(map(len, lines)) <= 43
    assert "\033" not in text and "\033[32mnew\033[0m" in side_by_side(before, after, color=True)


def test_color_only_on_a_terminal(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_color("auto", Terminal()) and not wants_color("auto", io.StringIO())
    assert wants_color("always", io.StringIO()) and not wants_color("never", Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color("auto", Terminal())


def test_names_that_the_text_needs_are_not_taken() -> None:
    graph = fx.Graph()
    x = graph.placeholder("primals_1")
    graph.output((graph.call_function(torch.ops.aten.full_like.default, (x, float("inf"))),))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    for label in ("aten", "float"):
        namespace: dict[str, Any] = {}
        exec(print_graph(gm, title="f", names=number_nodes([graph], {"primals_1": label})), namespace)
        torch.testing.assert_close(namespace["f"](torch.ones(2))[0], torch.full((2,), float("inf")))


def test_an_attribute_of_a_numbered_submodule() -> None:
    root = torch.nn.Sequential(torch.nn.Module())
    root[0].register_buffer("offset", torch.arange(3.0))
    graph = fx.Graph()
    graph.output((graph.get_attr("0.offset"),))
    gm = fx.GraphModule(root, graph)
    namespace: dict[str, Any] = {}
    exec(print_graph(gm, title="f"), namespace)
    torch.testing.assert_close(namespace["f"](gm)[0], torch.arange(3.0))
