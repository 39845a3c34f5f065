"""The text of a report: a table of weights, a table of skipped weights, a table of totals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tabulate import tabulate

from oasis_fx.compile.names import relative_name
from oasis_fx.inspect.decisions import PROJECTED, SAVED, Decision

if TYPE_CHECKING:
    from oasis_fx.inspect.report import GraphReport, SkippedRow, Totals, WeightRow

NO_ROWS = "no weight of this graph has a low-rank gradient"

DECISION_LEGEND = (
    "Tensors of the forward pass that the backward pass needs. projected: P and C are kept in place of it.\n"
    "computed in backward: a P or C that waits for an X that is there anyway. price: of recomputing it, in\n"
    "bytes of memory traffic that take as long; never: that is not done. A budget keeps what is dear for its size."
)

_LEAST_SHARE = 0.002  # of the bytes kept or freed, or of the FLOPs: what has less goes under "others"
_MIB = 2**20
_GIGA = 10**9

_NOTES = {
    "X is an input": "X is an input of the graph: it exists anyway and counts nowhere",
    "X was recomputed": "without the passes the backward pass would recompute X from what it keeps anyway",
    "X also kept": "another operation of the backward pass reads X, so it is not freed",
    "P recomputed": "the backward pass recomputes P from an X that is kept anyway",
    "dW projected": "X is kept, dW is computed at full size in the backward pass; FLOPs are of its projection",
}


@dataclass(frozen=True)
class Table:
    """A table of texts; ``right`` are the columns that are aligned to the right, those of numbers."""

    headers: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: tuple[int, ...] = ()

    @property
    def labels(self) -> list[str]:
        """What each column is called where it stands by itself: one without a first line has that of its neighbour."""
        labels, first = [], ""
        for header in self.headers:
            above, _, below = header.rpartition("\n")
            first = above or first
            labels.append(f"{first} {below}" if "\n" in header else header)
        return labels

    def __str__(self) -> str:
        align = ["right" if index in self.right else "left" for index in range(len(self.headers))]
        # Numbers are texts already: tabulate would print a rounded 0.10 as 0.1.
        return tabulate(self.rows, headers=self.headers, tablefmt="simple", disable_numparse=True, colalign=align)


def format_report(report: GraphReport) -> str:
    """Return all tables of one graph as text, with a line for each note that occurs in them."""
    parts = [str(weight_table(report.rows)), legend(report.rows)] if report.rows else [NO_ROWS]
    if report.skipped:
        parts.append(str(skipped_table(report.skipped)))
    if report.decisions:
        parts += [str(decision_table(report.decisions)), DECISION_LEGEND]
    if report.totals is not None:
        parts.append(str(totals_table(report.totals)))
    parts += map(str, report.traffic)
    return "\n\n".join(part for part in parts if part)


def weight_table(rows: Sequence[WeightRow]) -> Table:
    """Make the table of the weights with low-rank gradients."""
    lines = []
    for row in rows:
        saved = [_scaled(row.saved_bytes_before, _MIB), _scaled(row.saved_bytes_after, _MIB)]
        flops = [_scaled(row.flops_before, _GIGA), _scaled(row.flops_after, _GIGA)]
        others = ", ".join(relative_name(name, row.name) for name in row.shares_with)
        lines.append((row.name, _shape(row.shape), str(row.rank), others, *saved, *flops, row.note))
    headers = ("low-rank gradient", "shape", "rank", "shares its basis with", "saved MiB\nbefore", "\nafter")
    return Table((*headers, "dW GFLOP\nbefore", "\nafter", "note"), lines, (2, 4, 5, 6, 7))


def legend(rows: Sequence[WeightRow]) -> str:
    """Explain what needs it in the table of weights, a line each."""
    present = [note for note in _NOTES if any(note in row.note.split(", ") for row in rows)]
    lines = [f"{note}: {_NOTES[note]}" for note in present]
    if any(row.shares_with for row in rows):
        lines.insert(0, "Bytes of weights that share a basis stand in the row of the first.")
    return "\n".join(lines)


def skipped_table(rows: Sequence[SkippedRow]) -> Table:
    """Make the table of the weights with dense gradients."""
    return Table(("dense gradient", "shape", "reason"), [(row.name, _shape(row.shape), row.reason) for row in rows])


def decision_table(found: Sequence[Decision]) -> Table:
    """Make the table of decisions: equal tensors of equal layers in one row, what matters least at the end."""
    kept_or_freed = sum(one.num_bytes for one in found if one.decision in (SAVED, PROJECTED))
    all_flops = sum(one.flops for one in found)

    def matters(one: Decision) -> bool:
        if one.decision in (SAVED, PROJECTED):
            return one.num_bytes >= _LEAST_SHARE * kept_or_freed
        return one.flops >= _LEAST_SHARE * max(1, all_flops)  # Inductor fuses the rest into what reads it

    rows: dict[tuple[str, ...], list[Decision]] = {}
    for one in found:
        what = ("others", "", "")
        if matters(one):
            place = re.sub(r"\b\d+\b", "*", one.module)
            what = (place or "-", one.operator, " x ".join(map(str, one.shape)) or "-")
        rows.setdefault((*what, one.decision), []).append(one)
    ordered = sorted(rows.items(), key=lambda item: item[0][0] == "others")
    headers = ("tensor of", "operator", "shape", "number", "decision", "MiB", "recomputing\nGFLOP", "price\nMiB")
    return Table(headers, [_decision_line(*item) for item in ordered], (3, 5, 6, 7))


def _decision_line(key: tuple[str, ...], members: Sequence[Decision]) -> tuple[str, ...]:
    *what, decision = key
    flops, price = sum(one.flops for one in members), sum(one.price for one in members)
    again = "-" if decision == PROJECTED else _scaled(flops, _GIGA)
    text = "-" if decision == PROJECTED else "never" if math.isinf(price) else _scaled(price, _MIB)
    return (*what, str(len(members)), decision, _scaled(sum(one.num_bytes for one in members), _MIB), again, text)


def totals_table(totals: Totals) -> Table:
    """Make the table of totals."""
    quantities = [
        ("saved for backward, MiB", totals.saved_bytes_before, totals.saved_bytes_after, _MIB),
        ("matmuls forward and backward, GFLOP", totals.matmul_flops_before, totals.matmul_flops_after, _GIGA),
        ("gradients (dW; G, C), MiB", totals.gradient_bytes_before, totals.gradient_bytes_after, _MIB),
        ("Adam (moments; moments, bases), MiB", totals.adam_bytes_before, totals.adam_bytes_after, _MIB),
    ]
    lines = [
        (name, _scaled(before, unit), _scaled(after, unit), f"{after / before:.2f}" if before else "-")
        for name, before, after, unit in quantities
    ]
    return Table(("total", "stock torch.compile", "oasis_fx", "ratio"), lines, (1, 2, 3))


def _scaled(amount: float, unit: int) -> str:
    scaled = amount / unit
    if scaled == 0:
        return "0"
    return f"{scaled:,.2f}" if scaled >= 0.1 else f"{scaled:.2g}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape))
