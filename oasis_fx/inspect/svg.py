"""A graph as an SVG, in a page or alone: the forward half downwards on the left, the backward half upwards."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from oasis_fx.inspect.drawing import Arrow, Box, Drawing
from oasis_fx.inspect.placement import Placement, place
from oasis_fx.inspect.text_width import shape_and_size, shortened

_WIDTH, _HEIGHT = 144, 34  # of a box, in pixels
_COLUMN, _ROW = 154, 58
_MARGIN, _GAP = 12, 80
_ROOM = _WIDTH - 10  # for the text of a box
_TITLED = 30  # pixels for the title of a drawing in a file
_TITLE, _DETAIL = 11, 9  # font sizes, as the page has them
_CLASSES = {"+": "added", "-": "removed"}


def format_svg(drawing: Drawing) -> str:
    """Return an ``<svg>`` element; the page colours its classes added, removed, saved, recomputed, input, outside."""
    inside, width, height = _element(drawing)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" role="img">\n{inside}\n</svg>'
    )


def format_svg_file(drawings: Sequence[tuple[str, Drawing]], style: str) -> str:
    """Return drawings as one SVG to be a file of its own, one under the other, each below its title.

    Args:
        drawings: each with its title.
        style: the rules of CSS for the classes that `format_svg` names.
    """
    parts: list[str] = []
    widest, top = 0.0, 0
    for title, drawing in drawings:
        inside, width, height = _element(drawing)
        parts.append(f'<text class="title" x="{_MARGIN}" y="{top + 22}">{escape(title)}</text>')
        parts.append(f'<g transform="translate(0 {top + _TITLED})">\n{inside}\n</g>')
        widest, top = max(widest, width), top + _TITLED + height + _MARGIN
    size = f'viewBox="0 0 {widest:.0f} {top}" width="{widest:.0f}" height="{top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<style>\n{style}</style>'
    return "\n".join([head, '<rect class="page" width="100%" height="100%"/>', *parts, "</svg>"]) + "\n"


def _element(drawing: Drawing) -> tuple[str, float, int]:
    """What is inside of a drawing's element, and its width and height."""
    halves = {half: [box for box in drawing.boxes if box.half == half] for half in ("forward", "backward")}
    placements = {half: _place(boxes, drawing.arrows) for half, boxes in halves.items()}
    rows = max(1 + max(placed.layer.values(), default=0) for placed in placements.values())
    spot: dict[str, tuple[float, float]] = {}
    paths: list[str] = []
    left = float(_MARGIN)
    heads = []
    for half, placed in placements.items():
        if not placed.column:
            continue
        heads.append(f'<text class="half" x="{left:.0f}" y="16">{half}</text>')

        def at(column: float, layer: int, half: str = half, left: float = left) -> tuple[float, float]:
            row = layer if half == "forward" else rows - 1 - layer
            return left + column * _COLUMN + _WIDTH / 2, 30 + row * _ROW + _HEIGHT / 2

        spot |= {name: at(column, placed.layer[name]) for name, column in placed.column.items()}
        for (source, target), bends in placed.bends.items():
            points = [at(column, placed.layer[source] + 1 + index) for index, column in enumerate(bends)]
            paths.append(_path([spot[source], *points, spot[target]], down=half == "forward"))
        widest = max([*placed.column.values(), *(c for bends in placed.bends.values() for c in bends)])
        left += (widest + 1) * _COLUMN + _GAP
    saved = {box.name for box in drawing.boxes if box.saved}
    crossing = [_crossing(a, spot, a.source in saved) for a in drawing.arrows if a.crossing]
    boxes = [_box(box, *spot[box.name]) for box in drawing.boxes]
    width, height = left - _GAP + _MARGIN, 30 + rows * _ROW
    return "\n".join([*heads, *paths, *crossing, *boxes]), width, height


def _place(boxes: list[Box], arrows: tuple[Arrow, ...]) -> Placement:
    names = [box.name for box in boxes]
    inside = set(names)
    return place(names, [(a.source, a.target) for a in arrows if a.source in inside and a.target in inside])


def _path(points: list[tuple[float, float]], *, down: bool) -> str:
    """A smooth line from box to box, by way of the points between."""
    reach = _HEIGHT / 2 if down else -_HEIGHT / 2
    (x, y), (end_x, end_y) = points[0], points[-1]
    points = [(x, y + reach), *points[1:-1], (end_x, end_y - reach)]
    steps = [f"M{points[0][0]:.1f},{points[0][1]:.1f}"]
    for (x, y), (next_x, next_y) in pairwise(points):
        middle = (y + next_y) / 2
        steps.append(f"C{x:.1f},{middle:.1f} {next_x:.1f},{middle:.1f} {next_x:.1f},{next_y:.1f}")
    return f'<path class="arrow" d="{"".join(steps)}"/>'


def _crossing(arrow: Arrow, spot: dict[str, tuple[float, float]], saved: bool) -> str:
    (x, y), (end_x, end_y) = spot[arrow.source], spot[arrow.target]
    x, end_x = x + _WIDTH / 2, end_x - _WIDTH / 2
    middle = (x + end_x) / 2
    look = "saved" if saved else "recomputed"
    path = f"M{x:.1f},{y:.1f}C{middle:.1f},{y:.1f} {middle:.1f},{end_y:.1f} {end_x:.1f},{end_y:.1f}"
    return (
        f'<path class="arrow {look}" d="{path}"><title>{escape(arrow.source)} to {escape(arrow.target)}</title></path>'
    )


def _box(box: Box, x: float, y: float) -> str:
    classes = ["box", box.kind, _CLASSES.get(box.mark[:1], ""), "saved" if box.saved else ""]
    return (
        f'<g class="{" ".join(filter(None, classes))}"><title>{escape(box.hint)}: {escape(box.detail)}</title>'
        f'<rect x="{x - _WIDTH / 2:.1f}" y="{y - _HEIGHT / 2:.1f}" width="{_WIDTH}" height="{_HEIGHT}" rx="4"/>'
        f'<text x="{x:.1f}" y="{y - 3:.1f}">{escape(shortened(box.title, _TITLE, _ROOM))}</text>'
        f'<text class="detail" x="{x:.1f}" y="{y + 11:.1f}">'
        f"{escape(shape_and_size(box.detail, _DETAIL, _ROOM))}</text></g>"
    )
