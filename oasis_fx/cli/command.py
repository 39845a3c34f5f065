"""Run one command of the command line."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext

from oasis_fx.cli import output
from oasis_fx.cli.files import check_writable
from oasis_fx.cli.noise import without_noise
from oasis_fx.cli.parser import make_parser, plan_settings_of, settings_of
from oasis_fx.cli.progress import Progress
from oasis_fx.cli.targets import TargetError
from oasis_fx.plan import command as plan

_FILES = ("output", "html", "json", "chart")  # arguments that name a file to write
_LONGEST = 500  # characters of a failure that are shown: torch says what went wrong first, and much else behind it
_INTERRUPTED = 130  # as shells have it: 128 and the number of the signal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
        0 where it was done; 1 where nothing of the model was compiled, or the model failed as it ran; 130 where it was
        interrupted.

    Raises:
        SystemExit: with code 2, where an argument or the target is wrong, after a line on stderr that says what.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    command = parser.commands[args.command]
    try:  # of a bad setting, a file that cannot be written, a glob or an --only that names nothing of the model
        if args.command == "print":
            output.check_print(args)
        for name in _FILES:
            if getattr(args, name, None) is not None:
                check_writable("-o" if name == "output" else f"--{name}", getattr(args, name))
        with nullcontext() if args.debug else without_noise():
            return _run(args)
    except (ValueError, TargetError, OSError) as error:
        if args.debug:
            raise
        command.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("oasis-fx: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:  # of the model, as it runs, or of torch, as it compiles it
        if args.debug:
            raise
        said = textwrap.shorten(f"{type(error).__name__}: {error}", _LONGEST)
        print(f"oasis-fx: {args.command} failed: {said}\n(--debug shows where)", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    if args.command == "plan":
        settings = plan_settings_of(args)
        with Progress() as progress:
            text = plan.run(args, settings, progress.tell)
        output.write(text, args.output)
        return 0
    settings = settings_of(args)
    with Progress() as progress:
        records = output.trace(args, settings, progress.tell)
        if records:
            progress.tell("writing it down")
            page = output.report_as_page(records, args) if args.command == "explain" and args.html else None
            text = output.explain(records) if args.command == "explain" else output.print_graphs(records, args)
    if not records:
        print("oasis-fx: torch.compile found no graph in this model", file=sys.stderr)
        return 1
    if page is not None:
        output.write(page, args.html)
    output.write(text, args.output)
    return 0
