"""Pages of HTML, each whole in one file: the report of a model, and its graphs; and drawings as an SVG."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined  # torch depends on jinja2
from markupsafe import Markup, escape

from oasis_fx.compile.lowering import CompiledGraph
from oasis_fx.inspect.block import typical_block
from oasis_fx.inspect.drawing import draw
from oasis_fx.inspect.estimate import Estimate, estimate_dense
from oasis_fx.inspect.graphs import GRAPHS, GraphSet, graphs, views
from oasis_fx.inspect.merging import merge_boxes
from oasis_fx.inspect.node_table import node_table
from oasis_fx.inspect.printing import operator_name
from oasis_fx.inspect.report import GraphReport, report
from oasis_fx.inspect.report_table import (
    DECISION_LEGEND,
    NO_ROWS,
    Table,
    decision_table,
    legend,
    skipped_table,
    totals_table,
    weight_table,
)
from oasis_fx.inspect.svg import format_svg, format_svg_file
from oasis_fx.memory.node_costs import readable_bytes, saved_storages
from oasis_fx.settings import Settings

_LEAST_BAR = 200  # what is shorter than this part of the longest goes under "other"
_MOST_BOXES = 250  # of a drawing that a person can follow


@dataclass(frozen=True)
class Bar:
    """Bytes that the results of one operator keep for the backward pass."""

    operator: str
    before: int
    after: int


def report_page(records: Sequence[CompiledGraph], settings: Settings, *, title: str, only: str | None = None) -> str:
    """Return the report as a page: tables, bars of saved bytes, a drawing of one block before and after.

    Args:
        settings: those of the records, for the ranks of weights that were left alone.
        only: the module to draw; the first block of several weights by default.

    Raises:
        ValueError: nothing belongs to ``only``.
    """
    sets = {id(shown.record): shown for shown in graphs(records)}
    views([*sets.values()], ("before", "after"), only)
    pages = [
        _report_context(found, sets.get(id(record)), settings, only)
        for record, found in zip(records, report(records), strict=True)
    ]
    return _render("report.html", title=title, settings=str(settings), graphs=pages, no_rows=NO_ROWS)


def graphs_page(
    sets: Sequence[GraphSet], *, title: str, which: Sequence[str] = GRAPHS, only: str | None = None, note: str = ""
) -> str:
    """Return graphs as a page: a drawing and a table of the nodes of each.

    Raises:
        ValueError: nothing belongs to ``only``.
    """
    pages = []
    for caption, shown, name in views(sets, which, only):
        facts = [shown.facts(name)[node.name] for node in shown.nodes(name, only)]
        looks = [{"+": "added", "-": "removed"}.get(one.mark[:1], "") + " saved" * one.saved for one in facts]
        table = node_table(shown, name, only)
        pages.append({"title": caption, "svg": _drawing(shown, name, only), "table": table, "classes": looks})
    return _render("graphs.html", title=title, graphs=pages, note=note)


def graphs_svg(sets: Sequence[GraphSet], *, which: Sequence[str] = ("before", "after"), only: str | None = None) -> str:
    """Return drawings of graphs as one SVG, a file of its own.

    Raises:
        ValueError: nothing belongs to ``only``, or there is too much to draw.
    """
    drawings = [(title, merge_boxes(draw(shown, name, only))) for title, shown, name in views(sets, which, only)]
    if any(len(drawing.boxes) > _MOST_BOXES for _, drawing in drawings):
        raise ValueError(f"there are more than {_MOST_BOXES} boxes to draw: choose a module with --only")
    style = _environment().get_template("drawing.css").render() + "\n"
    return format_svg_file(drawings, style)


def saved_by_operator(shown: GraphSet) -> list[Bar]:
    """Count what is kept for the backward pass before and after, the longest bar first; P and C count apart."""
    before, after = _saved(shown, "before"), _saved(shown, "after")
    longest = max([*before.values(), *after.values()], default=1)
    for name in {*before, *after}:
        if "+" not in name and max(before[name], after[name]) < longest / _LEAST_BAR:
            before["other"] += before.pop(name, 0)
            after["other"] += after.pop(name, 0)
    bars = [Bar(name, before[name], after[name]) for name in {*before, *after}]
    return sorted(bars, key=lambda bar: (-max(bar.before, bar.after), bar.operator))


def _saved(shown: GraphSet, which: str) -> Counter[str]:
    forward = shown.stock[0] if which == "before" else shown.forward.graph
    facts = shown.facts(which)
    sizes = saved_storages(forward, shown.trace.num_forward_outputs)
    totals: Counter[str] = Counter()
    for node in forward.nodes:
        if node.name in sizes:
            # getitem says nothing: the operator is what made the tuple.
            maker = node.all_input_nodes[0] if operator_name(node) == "getitem" else node
            totals[f"{operator_name(maker)} {facts[node.name].mark.lstrip('-')}".strip()] += sizes[node.name]
    return totals


def _report_context(
    found: GraphReport, shown: GraphSet | None, settings: Settings, only: str | None
) -> dict[str, object]:
    estimates = estimate_dense(shown, settings.rank_of) if shown is not None else {}
    block = only or typical_block([row.name for row in found.rows])
    return {
        "totals": totals_table(found.totals) if found.totals is not None else None,
        "bars": saved_by_operator(shown) if shown is not None else [],
        "weights": weight_table(found.rows) if found.rows else None,
        "legend": legend(found.rows).splitlines(),
        "decisions": decision_table(found.decisions) if found.decisions else None,
        "decision_legend": DECISION_LEGEND,
        "skipped": _with_estimates(skipped_table(found.skipped), estimates) if found.skipped else None,
        "block": block,
        "before": _drawing(shown, "before", block) if shown is not None else None,
        "after": _drawing(shown, "after", block) if shown is not None else None,
    }


def _with_estimates(table: Table, estimates: dict[str, Estimate]) -> Table:
    rows = []
    for name, *rest in table.rows:
        estimate = estimates.get(name)
        text = "-" if estimate is None else readable_bytes(estimate.saved) if estimate.saved else "0"
        rows.append((name, *rest, text))
    return replace(table, headers=(*table.headers, "would save"), rows=rows, right=(len(table.headers),))


def _drawing(shown: GraphSet, which: str, only: str | None) -> Markup | None:
    drawing = merge_boxes(draw(shown, which, only))
    return Markup(format_svg(drawing)) if 0 < len(drawing.boxes) <= _MOST_BOXES else None


def _breakable(text: str) -> Markup:
    """Let a browser break a name where a person would, after a dot or an underscore; numbers stay whole."""
    return Markup(re.sub(r"(?<=[^\W\d_])([._]+)(?=\w)|(?<=\w)([._]+)(?=[^\W\d_])", r"\g<0><wbr>", str(escape(text))))


def _render(template: str, **context: Any) -> str:
    return _environment().get_template(template).render(context) + "\n"


def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("oasis_fx.inspect"), autoescape=True, undefined=StrictUndefined)
    environment.filters["readable_bytes"] = readable_bytes
    environment.filters["breakable"] = _breakable
    return environment
