"""The command line: ``oasis-fx print`` shows the graphs of a model, ``oasis-fx explain`` what became of its weights."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oasis_fx.config import INNER_COMPILERS, SUBSPACES, Settings
from oasis_fx.diff import COLOR_CHOICES, side_by_side, wants_color

if TYPE_CHECKING:
    from oasis_fx.lowering import CompiledGraph

_GRAPHS = ("before", "after", "forward", "backward", "all")
_TARGET = "module:callable or file.py:callable that returns (model, example_inputs), or the name of an example"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    0: done. 1: nothing of the model was compiled. 2: an argument or the target is wrong, as a line on stderr says.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "print" and args.diff and args.graph is not None:
        parser.error("--diff shows the joint graph before and after: it goes without --graph")
    try:
        records = _trace(args, _settings(args))
    except ValueError as error:  # a bad setting, or a glob that matches no weight of the model
        parser.error(str(error))
    if not records:
        print("oasis-fx: torch.compile found no graph in this model", file=sys.stderr)
        return 1
    text = _explain(records) if args.command == "explain" else _print(records, args)
    if args.output is None:
        sys.stdout.write(text)
    else:
        Path(args.output).write_text(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="oasis-fx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    printer = commands.add_parser("print", help="the joint graph before and after the passes, forward and backward")
    explainer = commands.add_parser("explain", help="each weight: its rank, what it saves, or why it was skipped")
    for command in (printer, explainer):
        _add_common(command)
    printer.add_argument("--graph", choices=_GRAPHS, help="which graph (default: all)")
    printer.add_argument("--diff", action="store_true", help="the joint graph before and after, side by side")
    printer.add_argument("--color", choices=COLOR_CHOICES, default="auto", help="of --diff (default: on a terminal)")
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", help=_TARGET)
    command.add_argument("--rank", default="32", help="whole number, fraction, or JSON dict of globs to either")
    command.add_argument("--include", action="append", metavar="GLOB", help="weights to rewrite; repeatable")
    command.add_argument("--exclude", action="append", metavar="GLOB", help="weights to leave alone; repeatable")
    command.add_argument("--subspace", choices=SUBSPACES, default=SUBSPACES[0], help="how a basis moves")
    command.add_argument("--inner", choices=INNER_COMPILERS, default=INNER_COMPILERS[0], help="whose graphs to show")
    command.add_argument("--memory-budget", type=float, default=1.0, metavar="X", help="0 to 1, as in the backend")
    command.add_argument("--dynamic", action="store_true", help="with symbolic sizes")
    command.add_argument("-o", "--output", metavar="FILE", help="write there, not to the terminal")


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        rank=_rank(args.rank),
        subspace=args.subspace,
        include=args.include,
        exclude=args.exclude,
        inner=args.inner,
        memory_budget=args.memory_budget,
    )


def _rank(text: str) -> Any:
    try:
        return json.loads(text)  # numbers are JSON too; what they may be is for Settings to say
    except ValueError as error:
        raise ValueError(f"rank is {text!r}: give a number, or a JSON dict such as '{{\"*\": 32}}'") from error


def _trace(args: argparse.Namespace, settings: Settings) -> list[CompiledGraph]:
    # Late: `oasis-fx --help` and a bad argument need not wait for the compiler's modules.
    from oasis_fx.targets import load_target
    from oasis_fx.tracing import trace_model

    model, inputs = load_target(args.target)
    return trace_model(model, inputs, settings, dynamic=True if args.dynamic else None)


def _explain(records: Sequence[CompiledGraph]) -> str:
    from oasis_fx.report import report

    tables = [str(graph) for graph in report(records)]
    if len(tables) > 1:
        tables = [f"graph {index} of {len(tables)}\n\n{table}" for index, table in enumerate(tables, 1)]
    return "\n\n\n".join(tables) + "\n"


def _print(records: Sequence[CompiledGraph], args: argparse.Namespace) -> str:
    from oasis_fx.graphs import GRAPHS, graphs

    sets = graphs(records)
    parts = []
    for index, shown in enumerate(sets, 1):
        where = f" of graph {index} of {len(sets)}" if len(sets) > 1 else ""
        if args.diff:
            color = wants_color(args.color, sys.stdout) and (args.output is None or args.color == "always")
            width = max(shutil.get_terminal_size((160, 24)).columns, 40)
            titles = f"before{where}", f"after{where}"
            before, after = shown.text("before", notes=False), shown.text("after", notes=False)
            parts.append(side_by_side(before, after, width=width, color=color, titles=titles))
        else:
            chosen = GRAPHS if args.graph in (None, "all") else (args.graph,)
            parts += [f"# {which}{where}\n{shown.text(which)}" for which in chosen]
    if len(sets) < len(records):
        parts.append(f"# {len(records) - len(sets)} of {len(records)} graphs have no weight in a subspace: not shown\n")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
