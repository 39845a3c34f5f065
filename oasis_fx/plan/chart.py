"""A plan as a stacked bar chart."""

from __future__ import annotations

from collections.abc import Sequence

from oasis_fx.plan.memory import KINDS
from oasis_fx.plan.methods import Row


def draw_chart(rows: Sequence[Row], title: str, file: str, limit: int | None = None) -> None:
    """Write a chart, as SVG, PNG or what else the file's ending asks for; a line where the limit in bytes is.

    Raises:
        ValueError: matplotlib is not installed, or does not know the ending.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--chart needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 1.2 + 0.38 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    names = [row.name for row in rows]
    start = [0.0] * len(rows)
    for kind in KINDS:
        sizes = [row.memory.bytes_of[kind] / 2**30 for row in rows]
        axis.barh(names, sizes, left=start, label=kind, height=0.7)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    for name, total in zip(names, start, strict=True):
        axis.annotate(f" {total:.1f}", (total, name), va="center", fontsize=8)
    if limit is not None:
        axis.axvline(limit / 2**30, color="0.3", linestyle="--")
    axis.invert_yaxis()
    axis.set(xlabel="GiB at the peak of a step", title=title)
    axis.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(file)
