"""The arguments of the command line, and the settings that they stand for."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from typing import Any

from oasis_fx import __version__
from oasis_fx.cli.samples import SAMPLES
from oasis_fx.inspect.diff import COLOR_CHOICES
from oasis_fx.plan import command as plan
from oasis_fx.ranks import parse_auto_rank
from oasis_fx.runtime.subspaces.rules import RULES, rule_of
from oasis_fx.settings import INNER_COMPILERS, Settings

_DESCRIPTION = (
    "oasis-fx print shows the graphs of a model, oasis-fx explain what became of its weights, and oasis-fx plan what a "
    "training step would need. Each command has its own --help, with examples."
)
_EXIT_CODES = """
exit codes: 0 done, 1 the model failed or has no graph, 2 a bad argument (a line on stderr says which), 130 interrupted
"""
_EXAMPLES = {
    "print": """
examples:
  oasis-fx print mlp --rank 4 --graph after                 Python that runs: bytes, source lines, what was added
  oasis-fx print tiny_llama --only layers.0                 one module or weight
  oasis-fx print tiny_llama --diff                          the joint graph before and after, side by side
  oasis-fx print mlp --format dot --graph after -o mlp.dot  for Graphviz: dot -Tsvg mlp.dot
  oasis-fx print tiny_llama --format html -o graphs.html    drawings and tables in one page
  oasis-fx print mlp --only 2 --format svg -o mlp.svg       a drawing, before and after
  oasis-fx print my_model.py:build                          def build(): return model, example_inputs
""",
    "explain": """
examples:
  oasis-fx explain tiny_llama                               tables on the terminal
  oasis-fx explain tiny_llama --html report.html            a page with drawings, too
  oasis-fx explain Qwen3-0.6B --blocks 2 --rank 128         a model by its name: on fake tensors, without its weights
  oasis-fx explain package.module:function --rank 0.25      any callable that returns (model, example_inputs)
""",
    "plan": """
examples:
  oasis-fx plan Qwen3-8B --batch 1 --seq 2048 --rank 128    peak memory of a step, by method and kind
  oasis-fx plan Qwen3-8B --fit 24GiB                        which settings fit on such a card, the quickest first
  oasis-fx plan SmolLM2-135M --time H100 --chart plan.svg   times by a roofline model, and a chart
  oasis-fx plan path/to/folder --json plan.json             a folder with a config.json
""",
}
_GRAPHS = ("before", "after", "forward", "backward", "all")
_FORMATS = ("python", "table", "dot", "html", "svg")
_TARGET = (
    f"module:callable or file.py:callable that returns (model, example_inputs); {' or '.join(SAMPLES)}, small samples; "
    f"or a causal language model by its name: {plan.MODEL}"
)


class Parser(argparse.ArgumentParser):
    """A parser that knows those of its commands.

    Attributes:
        commands: parsers by the command's name.
    """

    commands: dict[str, argparse.ArgumentParser]


def make_parser() -> Parser:
    """Make the parser of all commands."""
    parser = Parser(
        prog="oasis-fx",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"oasis-fx {__version__}, torch {version('torch')}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=argparse.ArgumentParser)
    about = {
        "print": "the joint graph before and after the passes, forward and backward",
        "explain": "each weight: its rank, what it saves, or why it was skipped",
        "plan": "peak memory and time of a training step, by method, without allocating it",
    }
    parser.commands = {
        name: commands.add_parser(
            name,
            help=what,
            description=what,
            epilog=_EXAMPLES[name] + _EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, what in about.items()
    }
    printer, explainer, planner = parser.commands.values()
    for command in (printer, explainer):
        command.add_argument("target", help=_TARGET)
        _add_common(command)
    plan.add_arguments(planner)
    _add_shared(planner)
    printer.add_argument("--graph", choices=_GRAPHS, help="which graph (default: all; svg: before and after)")
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
    plan.add_sizes(command.add_argument_group("of a model that is given by its name"))


def _add_shared(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rank", default="32", help="number, fraction, auto:FRACTION, or JSON dict of globs")
    command.add_argument("--tail", type=_number, metavar="X", help="columns drawn anew at each step: number, fraction")
    command.add_argument("--memory-budget", type=_budget, default=1.0, metavar="X", help="0 to 1, or a size: 12GiB")
    command.add_argument("-o", "--output", metavar="FILE", help="write there, not to the terminal")
    command.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def settings_of(args: argparse.Namespace) -> Settings:
    """Make the settings that the arguments of ``print`` or ``explain`` stand for.

    Raises:
        ValueError: an argument has a value that is not allowed.
    """
    return Settings(
        rank=parse_rank(args.rank),
        subspace=rule_of(args.subspace, every=args.subspace_every),
        include=args.include,
        exclude=args.exclude,
        inner=args.inner,
        memory_budget=args.memory_budget,
        tail=args.tail,
    )


def plan_settings_of(args: argparse.Namespace) -> Settings:
    """Make the settings that the arguments of ``plan`` stand for.

    Raises:
        ValueError: an argument has a value that is not allowed.
    """
    return Settings(rank=parse_rank(args.rank), memory_budget=args.memory_budget, tail=args.tail)


def parse_rank(text: str) -> Any:
    """Return the rank that a text stands for: a number, ``auto:0.25``, or a JSON dict of globs to numbers.

    Raises:
        ValueError: the text is nothing of that form.
    """
    if (found := parse_auto_rank(text)) is not None:
        return found
    try:
        return json.loads(text)  # numbers are JSON too; what they may be is for Settings to say
    except ValueError as error:
        raise ValueError(
            f"rank is {text!r}: give a number, auto:0.25, or a JSON dict such as '{{\"*\": 32}}'"
        ) from error


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _budget(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # a size; Settings says what is none
