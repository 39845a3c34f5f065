"""Where the labels of points go, so that none lies over another or over a point."""

from __future__ import annotations

import math
from collections.abc import Sequence

from oasis_fx.inspect.text_width import text_width

Box = tuple[float, float, float, float]  # left, bottom, right, top

_HEIGHT = 1.25  # of a line, in parts of the font's size
_POINT = 3.0  # half of the width of a point
# From the point to the nearest corner of its label, the first that is free: the usual place, then further and further.
_PLACES = tuple(
    (dx * far, dy * far) for far in (1.0, 2.5, 4.5, 7.0, 10.0) for dx, dy in ((3, 3), (3, -3), (-3, 3), (-3, -3))
)


def place_labels(
    points: Sequence[tuple[float, float]], labels: Sequence[str], size: float, right: float = math.inf
) -> list[Box]:
    """Return the box of each label, beside its point.

    Args:
        points: in the unit of ``size``, upwards.
        labels: of the points; an empty one takes no room.
        size: of the font.
        right: where the picture ends.
    """
    taken = [(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in points]
    boxes = []
    for (x, y), label in zip(points, labels, strict=True):
        width, height = text_width(label, size), _HEIGHT * size
        tried = [_box(x + dx, y + dy, width, height, dx < 0, dy < 0) for dx, dy in _PLACES]
        tried = [box for box in tried if box[2] <= right] or tried
        box = min(tried, key=lambda one: sum(_shared(one, other) for other in taken))  # the first of equals
        boxes.append(box)
        if label:
            taken.append(box)
    return boxes


def _box(x: float, y: float, width: float, height: float, to_left: bool, below: bool) -> Box:
    left, bottom = x - width * to_left, y - height * below
    return left, bottom, left + width, bottom + height


def _shared(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    along = min(one[3], other[3]) - max(one[1], other[1])
    return across * along if across > 0 and along > 0 else 0.0
