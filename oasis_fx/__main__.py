"""The command line: ``oasis-fx print`` shows the graphs of a model, ``oasis-fx explain`` what became of its weights,
``oasis-fx plan`` what a training step would need."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oasis_fx import __version__
from oasis_fx.inspect.diff import COLOR_CHOICES, side_by_side, wants_color
from oasis_fx.plan import command as plan
from oasis_fx.ranks import parse_auto_rank
from oasis_fx.runtime.subspaces.rules import RULES, rule_of
from oasis_fx.settings import INNER_COMPILERS, Settings

if TYPE_CHECKING:
    from oasis_fx.compile.lowering import CompiledGraph
    from oasis_fx.inspect.graphs import GraphSet

_GRAPHS = ("before", "after", "forward", "backward", "all")
_FORMATS = ("python", "table", "dot", "html")
_TARGET = "module:callable or file.py:callable that returns (model, example_inputs), or the name of an example"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    0: done. 1: nothing of the model was compiled. 2: an argument or the target is wrong, as a line on stderr says.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "print" and args.diff and (args.graph or args.only or args.format != "python"):
        parser.error("--diff shows the joint graph before and after: it goes without --graph, --only and --format")
    if args.command == "plan":
        try:
            text = _plan(args)
        except ValueError as error:
            parser.error(str(error))
        return _write(text, args.output)
    try:
        records = _trace(args, _settings(args))
    except ValueError as error:  # a bad setting, or a glob that matches no weight of the model
        parser.error(str(error))
    if not records:
        print("oasis-fx: torch.compile found no graph in this model", file=sys.stderr)
        return 1
    try:
        if args.command == "explain" and args.html is not None:
            Path(args.html).write_text(_report_page(records, args), encoding="utf-8")
        text = _explain(records) if args.command == "explain" else _print(records, args)
    except ValueError as error:  # --only names nothing of the model
        parser.error(str(error))
    return _write(text, args.output)


def _write(text: str, file: str | None) -> int:
    if file is None:
        sys.stdout.write(text)
    else:
        Path(file).write_text(text, encoding="utf-8")
    return 0


def _plan(args: argparse.Namespace) -> str:
    return plan.run(args, Settings(rank=_rank(args.rank), memory_budget=args.memory_budget))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="oasis-fx", description=__doc__)
    parser.add_argument("--version", action="version", version=f"oasis-fx {__version__}, torch {version('torch')}")
    commands = parser.add_subparsers(dest="command", required=True)
    printer = commands.add_parser("print", help="the joint graph before and after the passes, forward and backward")
    explainer = commands.add_parser("explain", help="each weight: its rank, what it saves, or why it was skipped")
    for command in (printer, explainer):
        command.add_argument("target", help=_TARGET)
        _add_common(command)
    planner = commands.add_parser("plan", help="peak memory of a training step, by method, without allocating it")
    plan.add_arguments(planner)
    _add_shared(planner)
    printer.add_argument("--graph", choices=_GRAPHS, help="which graph (default: all)")
    printer.add_argument("--format", choices=_FORMATS, default="python", help="default: python, which runs")
    printer.add_argument("--only", metavar="NAME", help="nodes of a module or weight: its path, end of it, or a glob")
    printer.add_argument("--diff", action="store_true", help="the joint graph before and after, side by side")
    printer.add_argument("--color", choices=COLOR_CHOICES, default="auto", help="of --diff (default: on a terminal)")
    explainer.add_argument("--html", metavar="FILE", help="the report as a page with drawings, too")
    explainer.add_argument("--only", metavar="NAME", help="the module that --html draws (default: the first block)")
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    _add_shared(command)
    command.add_argument("--include", action="append", metavar="GLOB", help="weights to rewrite; repeatable")
    command.add_argument("--exclude", action="append", metavar="GLOB", help="weights to leave alone; repeatable")
    command.add_argument("--subspace", choices=tuple(RULES), default="oja", help="how a basis is chosen and moves")
    command.add_argument("--subspace-every", type=int, metavar="K", help="a basis moves every K steps")
    command.add_argument("--inner", choices=INNER_COMPILERS, default=INNER_COMPILERS[0], help="whose graphs to show")
    command.add_argument("--dynamic", action="store_true", help="with symbolic sizes")


def _add_shared(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rank", default="32", help="number, fraction, auto:FRACTION, or JSON dict of globs")
    command.add_argument("--memory-budget", type=_budget, default=1.0, metavar="X", help="0 to 1, or a size: 12GiB")
    command.add_argument("-o", "--output", metavar="FILE", help="write there, not to the terminal")


def _budget(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # a size; Settings says what is none


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        rank=_rank(args.rank),
        subspace=rule_of(args.subspace, every=args.subspace_every),
        include=args.include,
        exclude=args.exclude,
        inner=args.inner,
        memory_budget=args.memory_budget,
    )


def _rank(text: str) -> Any:
    if (found := parse_auto_rank(text)) is not None:
        return found
    try:
        return json.loads(text)  # numbers are JSON too; what they may be is for Settings to say
    except ValueError as error:
        raise ValueError(
            f"rank is {text!r}: give a number, auto:0.25, or a JSON dict such as '{{\"*\": 32}}'"
        ) from error


def _trace(args: argparse.Namespace, settings: Settings) -> list[CompiledGraph]:
    # Late: `oasis-fx --help` and a bad argument need not wait for the compiler's modules.
    from oasis_fx.cli.targets import load_target
    from oasis_fx.inspect.tracing import trace_model

    model, inputs = load_target(args.target)
    return trace_model(model, inputs, settings, dynamic=True if args.dynamic else None)


def _explain(records: Sequence[CompiledGraph]) -> str:
    from oasis_fx.inspect.report import report

    tables = [str(graph) for graph in report(records)]
    if len(tables) > 1:
        tables = [f"graph {index} of {len(tables)}\n\n{table}" for index, table in enumerate(tables, 1)]
    return "\n\n\n".join(tables) + "\n"


def _report_page(records: Sequence[CompiledGraph], args: argparse.Namespace) -> str:
    from oasis_fx.inspect.pages import report_page

    return report_page(records, _settings(args), title=f"oasis_fx on {args.target}", only=args.only)


def _print(records: Sequence[CompiledGraph], args: argparse.Namespace) -> str:
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


if __name__ == "__main__":
    sys.exit(main())
