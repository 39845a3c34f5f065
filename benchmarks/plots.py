"""The memory-time plane, and growth with one size, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.contenders import parse
from benchmarks.labels import place_labels
from benchmarks.tables import ratios

_FONT = 7  # of labels, in points


def plane(results: dict[str, Any], title: str, file: Path) -> None:
    """Seconds a step over peak memory and over saved bytes, ratios to the reference; a curve a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = ratios(results)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, constrained_layout=True)
    for axis, kind, label in zip(axes, ("peak", "saved"), ("peak memory", "saved for backward"), strict=True):
        curves: dict[str, list[tuple[float, float, str]]] = {}
        for name, own in found.items():
            curves.setdefault(_curve(name), []).append((own[kind], own["step"], name))
        for curve, points in curves.items():
            points.sort()
            axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=curve)
        axis.set(xlabel=f"{label}, ratio to stock", xlim=(0, None))
        axis.axhline(1, color="0.8", zorder=0)
        axis.axvline(1, color="0.8", zorder=0)
    axes[0].set(ylabel="seconds a step, ratio to stock")
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.suptitle(title, fontsize=10)
    figure.canvas.draw()  # which settles where points are,
    figure.set_layout_engine("none")  # and they stay there
    for axis, kind in zip(axes, ("peak", "saved"), strict=True):
        _label(
            axis, [(own[kind], own["step"], name.removeprefix(_curve(name)).lstrip("-")) for name, own in found.items()]
        )
    figure.savefig(file)
    plt.close(figure)


def _label(axis: Any, points: list[tuple[float, float, str]]) -> None:
    """Write the setting of each point beside it, with a line to it where there is no room close by."""
    scale = 72 / axis.figure.dpi  # pixels to points, which fonts are measured in
    at = [tuple(scale * axis.transData.transform((x, y))) for x, y, _ in points]
    labels = [label for *_, label in points]
    boxes = place_labels(at, labels, _FONT, right=scale * axis.bbox.x1)
    for (*point, label), (x, y), box in zip(points, at, boxes, strict=True):
        if not label:
            continue
        left, bottom = box[0] - x, box[1] - y
        axis.annotate(
            label,
            point,
            fontsize=_FONT,
            xytext=(left, bottom),
            textcoords="offset points",
            va="bottom",
            arrowprops={"arrowstyle": "-", "color": "0.7", "lw": 0.5, "shrinkA": 0, "shrinkB": 2},
        )


def _curve(name: str) -> str:
    method, _, options = parse(name)
    return method if method != "oasis" or not options.keys() & {"r", "no-stats"} else "oasis, other ranks"


def growth(series: dict[str, list[tuple[int, dict[str, Any]]]], title: str, file: Path) -> None:
    """Seconds a step and peak MiB of each contender over one size, both axes logarithmic; one column a size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(series), figsize=(3.2 * len(series), 6), constrained_layout=True, squeeze=False)
    for column, (size, runs) in enumerate(series.items()):
        names = list(runs[0][1])
        for name in names:
            done = [(at, results[name]) for at, results in runs if "sizes" in results.get(name, {})]
            seconds = [sorted(s["step"] for s in r["steps"])[len(r["steps"]) // 2] for _, r in done]
            peaks = [r["sizes"]["peak"] / 2**20 for _, r in done]
            for row, values in enumerate((seconds, peaks)):
                axes[row][column].plot([at for at, _ in done], values, marker="o", label=name)
        for row in (0, 1):
            axes[row][column].set(xscale="log", yscale="log")
        axes[1][column].set(xlabel=size)
    axes[0][0].set(ylabel="seconds a step")
    axes[1][0].set(ylabel="peak MiB")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file)
    plt.close(figure)
