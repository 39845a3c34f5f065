"""What the commands ``print`` and ``explain`` show of compiled graphs, as text."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oasis_fx.cli.parser import settings_of
from oasis_fx.cli.samples import SAMPLES
from oasis_fx.inspect.diff import side_by_side, wants_color
from oasis_fx.settings import Settings

_SIZES = ("batch", "seq", "blocks", "vocabulary", "dtype")

if TYPE_CHECKING:
    from oasis_fx.compile.lowering import CompiledGraph
    from oasis_fx.inspect.graphs import GraphSet


def trace(args: argparse.Namespace, settings: Settings, tell: Callable[[str], object]) -> list[CompiledGraph]:
    """Compile the model of a command, without code generation, and return what is known of each graph.

    A model that is known by its name is built on fake tensors: its weights are not needed.

    Args:
        tell: is called with a few words ahead of what takes long.

    Raises:
        ValueError: a glob of the settings matches no weight of the model, the target is not known, or sizes are given
            that do not go with it.
        TargetError: the target cannot be loaded.
    """
    # Late: `oasis-fx --help` and a bad argument need not wait for the compiler's modules.
    from oasis_fx.cli.targets import is_callable, load_target
    from oasis_fx.inspect.tracing import trace_model

    tell(f"loading {args.target}")
    if not is_callable(args.target):
        return _trace_by_name(args, settings, tell)
    given = [f"--{name}" for name in _SIZES if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{given[0]} goes with a model that is given by its name: {args.target} makes its own inputs")
    model, inputs = load_target(args.target)
    tell(f"compiling {args.target}")
    return trace_model(model, inputs, settings, dynamic=True if args.dynamic else None)


def _trace_by_name(args: argparse.Namespace, settings: Settings, tell: Callable[[str], object]) -> list[CompiledGraph]:
    import torch

    from oasis_fx.plan.command import DTYPES, seq_of
    from oasis_fx.plan.configs import blocks_of, load_config
    from oasis_fx.plan.trace import compile_fake

    if args.dynamic:
        raise ValueError(f"--dynamic goes with a callable target: {args.target} is built with the sizes that are given")
    try:
        config = load_config(args.target, args.blocks, args.vocabulary)
    except ValueError as error:
        samples = " or ".join(SAMPLES)
        raise ValueError(f"{error}; a callable is written module:callable, a sample is {samples}") from error
    config.use_cache = False
    tell(f"compiling {blocks_of(config)} blocks of {args.target}; --blocks 2 takes fewer")
    dtype = getattr(torch, args.dtype or DTYPES[0])
    return compile_fake(config, args.batch or 1, seq_of(config, args.seq), dtype, settings)[1]


def check_print(args: argparse.Namespace) -> None:
    """Check the arguments of ``print`` that exclude one another.

    Raises:
        ValueError: two of them do.
    """
    if args.diff and (args.graph or args.only or args.format != "python"):
        raise ValueError("--diff shows the joint graph before and after: it goes without --graph, --only and --format")


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
    if args.format == "svg":
        from oasis_fx.inspect.pages import graphs_svg

        return graphs_svg(sets, which=("before", "after") if args.graph is None else chosen, only=args.only)
    if args.diff:
        parts = [_diff(shown, title.removeprefix("before"), args) for title, shown, _ in views(sets, ("before",))]
    else:
        found = views(sets, chosen, args.only)
        if args.format == "dot":
            return _dot(found, args) + (f"// {note}\n" if note else "")
        parts = [_one_graph(title, shown, which, args) for title, shown, which in found]
    return "\n\n".join([*parts, *([f"# {note}\n"] if note else [])])


def _dot(found: Sequence[tuple[str, GraphSet, str]], args: argparse.Namespace) -> str:
    from oasis_fx.inspect.dot import format_dot
    from oasis_fx.inspect.drawing import draw

    return format_dot([(title, draw(shown, which, args.only)) for title, shown, which in found])


def _one_graph(title: str, shown: GraphSet, which: str, args: argparse.Namespace) -> str:
    if args.format == "table":
        from oasis_fx.inspect.node_table import node_table

        return f"# {title}\n\n{node_table(shown, which, args.only)}\n"
    return f"# {title}\n{shown.text(which, only=args.only)}"


def _diff(shown: GraphSet, where: str, args: argparse.Namespace) -> str:
    color = wants_color(args.color, sys.stdout) and (args.output is None or args.color == "always")
    width = max(shutil.get_terminal_size((160, 24)).columns, 40)
    before, after = (shown.text(which, notes=False) for which in ("before", "after"))
    return side_by_side(before, after, width=width, color=color, titles=(f"before{where}", f"after{where}"))


def write(text: str, file: str | None) -> None:
    """Write a text to a file, or to the terminal where ``file`` is None."""
    if file is None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:  # `oasis-fx print mlp | head`: who reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
    else:
        Path(file).write_text(text, encoding="utf-8")
