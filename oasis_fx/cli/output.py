"""What the commands ``print`` and ``explain`` show of compiled graphs, as text."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oasis_fx.cli.parser import settings_of
from oasis_fx.inspect.diff import side_by_side, wants_color
from oasis_fx.settings import Settings

if TYPE_CHECKING:
    from oasis_fx.compile.lowering import CompiledGraph
    from oasis_fx.inspect.graphs import GraphSet


def trace(args: argparse.Namespace, settings: Settings) -> list[CompiledGraph]:
    """Compile the model of a command, without code generation, and return what is known of each graph.

    Raises:
        ValueError: a glob of the settings matches no weight of the model.
        SystemExit: with code 2, where the target cannot be loaded.
    """
    # Late: `oasis-fx --help` and a bad argument need not wait for the compiler's modules.
    from oasis_fx.cli.targets import load_target
    from oasis_fx.inspect.tracing import trace_model

    model, inputs = load_target(args.target)
    return trace_model(model, inputs, settings, dynamic=True if args.dynamic else None)


def explain(records: Sequence[CompiledGraph]) -> str:
    """Return the text of ``explain``: one table for each graph."""
    from oasis_fx.inspect.report import report

    tables = [str(graph) for graph in report(records)]
    if len(tables) > 1:
        tables = [f"graph {index} of {len(tables)}\n\n{table}" for index, table in enumerate(tables, 1)]
    return "\n\n\n".join(tables) + "\n"


def report_as_page(records: Sequence[CompiledGraph], args: argparse.Namespace) -> str:
    """Return the page of ``explain --html``.

    Raises:
        ValueError: ``--only`` names nothing of the model.
    """
    from oasis_fx.inspect.pages import report_page

    return report_page(records, settings_of(args), title=f"oasis_fx on {args.target}", only=args.only)


def print_graphs(records: Sequence[CompiledGraph], args: argparse.Namespace) -> str:
    """Return the text of ``print``, in the format that was asked for.

    Raises:
        ValueError: ``--only`` names nothing of the model.
    """
    from oasis_fx.inspect.graphs import GRAPHS, graphs, views

    sets = graphs(records)
    chosen = GRAPHS if args.graph in (None, "all") else (args.graph,)
    missing = len(records) - len(sets)
    note = f"{missing} of {len(records)} graphs have no weight in a subspace: not shown" if missing else ""
    if args.format == "html":
        from oasis_fx.inspect.pages import graphs_page

        return graphs_page(sets, title=f"Graphs of {args.target}", which=chosen, only=args.only, note=note)
    if args.diff:
        parts = [_diff(shown, title.removeprefix("before"), args) for title, shown, _ in views(sets, ("before",))]
    else:
        parts = [_one_graph(title, shown, which, args) for title, shown, which in views(sets, chosen, args.only)]
    mark = "//" if args.format == "dot" else "#"
    return "\n\n".join([*parts, *([f"{mark} {note}\n"] if note else [])])


def _one_graph(title: str, shown: GraphSet, which: str, args: argparse.Namespace) -> str:
    if args.format == "table":
        from oasis_fx.inspect.node_table import node_table

        return f"# {title}\n\n{node_table(shown, which, args.only)}\n"
    if args.format == "dot":
        from oasis_fx.inspect.dot import format_dot
        from oasis_fx.inspect.drawing import draw

        return format_dot(draw(shown, which, args.only), title)
    return f"# {title}\n{shown.text(which, only=args.only)}"


def _diff(shown: GraphSet, where: str, args: argparse.Namespace) -> str:
    color = wants_color(args.color, sys.stdout) and (args.output is None or args.color == "always")
    width = max(shutil.get_terminal_size((160, 24)).columns, 40)
    before, after = (shown.text(which, notes=False) for which in ("before", "after"))
    return side_by_side(before, after, width=width, color=color, titles=(f"before{where}", f"after{where}"))


def write(text: str, file: str | None) -> None:
    """Write a text to a file, or to the terminal where ``file`` is None."""
    if file is None:
        sys.stdout.write(text)
    else:
        Path(file).write_text(text, encoding="utf-8")
