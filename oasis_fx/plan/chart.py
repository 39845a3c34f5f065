"""A plan as a stacked bar chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oasis_fx.memory.node_costs import readable_bytes
from oasis_fx.plan.memory import KINDS
from oasis_fx.plan.methods import Row, unit_of


def check_chart(file: str) -> None:
    """Check that a chart can be drawn in the format that a file's ending asks for.

    Raises:
        ValueError: matplotlib is not installed, or does not know the ending.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ValueError("--chart needs matplotlib: pip install matplotlib") from error
    known = FigureCanvasAgg.get_supported_filetypes()
    ending = Path(file).suffix.removeprefix(".").lower()
    if ending not in known:
        allowed = ", ".join(f".{one}" for one in sorted(known))
        raise ValueError(f"--chart is {file!r}: its ending must be one of {allowed}")


def draw_chart(rows: Sequence[Row], title: str, file: str, limit: int | None = None) -> None:
    """Write a chart, as SVG, PNG or what else the file's ending asks for; a line where the limit in bytes is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit, unit_name = unit_of(rows)
    figure = Figure(figsize=(9, 1.8 + 0.38 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    names = [row.name for row in rows]
    start = [0.0] * len(rows)
    for kind in KINDS:
        sizes = [row.memory.bytes_of[kind] / unit for row in rows]
        axis.barh(names, sizes, left=start, label=kind, height=0.7)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    for name, total in zip(names, start, strict=True):
        axis.annotate(f" {total:.1f}", (total, name), va="center", fontsize=8)
    right = max(start)
    if limit is not None:
        axis.axvline(limit / unit, color="0.3", linestyle="--", label=f"--fit {readable_bytes(limit)}")
        right = max(right, limit / unit)
        # Above the bars, where nothing else stands; on the side of the line that has room for it.
        side = "right" if limit / unit > right / 2 else "left"
        axis.annotate(
            f" {readable_bytes(limit)} ",
            (limit / unit, 1),
            xycoords=("data", "axes fraction"),
            ha=side,
            va="bottom",
            fontsize=8,
        )
    axis.set_xlim(0, 1.1 * right)  # room for the figure behind the longest bar
    axis.invert_yaxis()
    axis.set_xlabel(f"{unit_name} at the peak of a step")
    figure.suptitle(title, fontsize=10, wrap=True)
    figure.legend(fontsize=8, ncols=4, loc="outside lower center")
    figure.savefig(file)
