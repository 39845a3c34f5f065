"""Run one command of the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from oasis_fx.cli import output
from oasis_fx.cli.parser import make_parser, plan_settings_of, settings_of
from oasis_fx.plan import command as plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
        0 where it was done, and 1 where nothing of the model was compiled.

    Raises:
        SystemExit: with code 2, where an argument or the target is wrong, after a line on stderr that says what.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command == "print" and args.diff and (args.graph or args.only or args.format != "python"):
        parser.error("--diff shows the joint graph before and after: it goes without --graph, --only and --format")
    try:  # of a bad setting, a glob that matches no weight of the model, or an --only that names nothing of it
        if args.command == "plan":
            output.write(plan.run(args, plan_settings_of(args)), args.output)
            return 0
        records = output.trace(args, settings_of(args))
        if not records:
            print("oasis-fx: torch.compile found no graph in this model", file=sys.stderr)
            return 1
        if args.command == "explain" and args.html is not None:
            output.write(output.report_as_page(records, args), args.html)
        text = output.explain(records) if args.command == "explain" else output.print_graphs(records, args)
    except ValueError as error:
        parser.error(str(error))
    output.write(text, args.output)
    return 0
