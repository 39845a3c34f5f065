"""The text of a report: a table of weights, a table of skipped weights, a table of totals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from oasis_fx.report import GraphReport, Totals, WeightRow

_MIB = 2**20
_GIGA = 10**9

_NOTES = {
    "X is an input": "X is an input of the graph: it exists anyway and counts nowhere",
    "X was recomputed": "without the passes the backward pass would compute X again from what it keeps anyway",
    "X also kept": "another operation of the backward pass reads X, so it is not freed",
    "P recomputed": "the backward pass computes P again from an X that is kept anyway",
}


def format_report(report: GraphReport) -> str:
    """All tables of one graph, with a line for each note that occurs in them."""
    parts = []
    if report.rows:
        parts.append(_weights(report.rows))
        parts.append(_legend(report.rows))
    else:
        parts.append("no weight of this graph has a low-rank gradient")
    if report.skipped:
        lines = [(row.name, _shape(row.shape), row.reason) for row in report.skipped]
        parts.append(_table(lines, ["dense gradient", "shape", "reason"], 0))
    if report.totals is not None:
        parts.append(_totals(report.totals))
    return "\n\n".join(part for part in parts if part)


def _weights(rows: Sequence[WeightRow]) -> str:
    lines = []
    for row in rows:
        saved = [_scaled(row.saved_bytes_before, _MIB), _scaled(row.saved_bytes_after, _MIB)]
        flops = [_scaled(row.flops_before, _GIGA), _scaled(row.flops_after, _GIGA)]
        others = ", ".join(relative_name(name, row.name) for name in row.shares_with)
        lines.append((row.name, _shape(row.shape), str(row.rank), others, *saved, *flops, row.note))
    headers = ["low-rank gradient", "shape", "rank", "shares its basis with", "saved MiB\nbefore", "\nafter"]
    return _table(lines, [*headers, "dW GFLOP\nbefore", "\nafter", "note"], 6)


def _legend(rows: Sequence[WeightRow]) -> str:
    present = [note for note in _NOTES if any(note in row.note.split(", ") for row in rows)]
    lines = [f"{note}: {_NOTES[note]}" for note in present]
    if any(row.shares_with for row in rows):
        lines.insert(0, "Bytes of weights that share a basis stand in the row of the first.")
    return "\n".join(lines)


def _totals(totals: Totals) -> str:
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
    return _table(lines, ["total", "stock torch.compile", "oasis_fx", "ratio"], 3)


def _table(lines: Sequence[Sequence[str]], headers: Sequence[str], num_right: int) -> str:
    # Numbers are texts already: tabulate would print a rounded 0.10 as 0.1.
    align = ["left"] * len(headers)
    start = {6: 2, 3: 1}.get(num_right, 0)
    for index in range(start, start + num_right):
        align[index] = "right"
    if num_right == 6:
        align[3] = "left"
    return tabulate(lines, headers=headers, tablefmt="simple", disable_numparse=True, colalign=align)


def _scaled(amount: float, unit: int) -> str:
    scaled = amount / unit
    if scaled == 0:
        return "0"
    return f"{scaled:,.2f}" if scaled >= 0.1 else f"{scaled:.2g}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape))


def relative_name(name: str, to: str) -> str:
    """``layers.0.k_proj.weight`` beside ``layers.0.q_proj.weight`` is ``k_proj``."""
    parts, others = name.split("."), to.split(".")
    while len(parts) > 1 and len(others) > 1 and parts[-1] == others[-1]:
        parts, others = parts[:-1], others[:-1]
    while len(parts) > 1 and len(others) > 1 and parts[0] == others[0]:
        parts, others = parts[1:], others[1:]
    return ".".join(parts)
