"""The arguments of the command line, and the settings that they stand for."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from typing import Any

from oasis_fx import __version__
from oasis_fx.inspect.diff import COLOR_CHOICES
from oasis_fx.plan import command as plan
from oasis_fx.ranks import parse_auto_rank
from oasis_fx.runtime.subspaces.rules import RULES, rule_of
from oasis_fx.settings import INNER_COMPILERS, Settings

_DESCRIPTION = (
    "oasis-fx print shows the graphs of a model, oasis-fx explain what became of its weights, and oasis-fx plan what a "
    "training step would need."
)
_GRAPHS = ("before", "after", "forward", "backward", "all")
_FORMATS = ("python", "table", "dot", "html")
_TARGET = "module:callable or file.py:callable that returns (model, example_inputs), or the name of an example"


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = argparse.ArgumentParser(prog="oasis-fx", description=_DESCRIPTION)
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
    command.add_argument("--tail", type=_number, metavar="X", help="columns drawn anew at each step: number, fraction")
    command.add_argument("--memory-budget", type=_budget, default=1.0, metavar="X", help="0 to 1, or a size: 12GiB")
    command.add_argument("-o", "--output", metavar="FILE", help="write there, not to the terminal")


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
