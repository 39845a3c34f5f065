"""Fewer boxes for the same drawing: what costs no memory and no matmul does not get one of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from oasis_fx.graph.runtime_inputs import RUNTIME_INPUTS
from oasis_fx.inspect.drawing import Arrow, Box, Drawing, module_of

_OF_THE_MODULE = ("weight", *RUNTIME_INPUTS, "parameter or buffer")


def merge_boxes(drawing: Drawing) -> Drawing:
    """Merge boxes of a drawing, so that a person can follow it.

    Views and items go into the box that they are of, weights into the titles of what reads them. A box of no matmul
    that is neither saved nor added nor removed goes into its reader, where it has one and that is no matmul: what is
    left is about what a compiler makes one kernel of.
    """
    drawing = _merge(drawing, _made_by)
    drawing = _name_weights(drawing)
    return _merge(drawing, _read_by)


def _merge(drawing: Drawing, into: Callable[[Drawing], dict[str, str]]) -> Drawing:
    """Put boxes into others; ``into`` gives the box that each goes into."""
    homes = into(drawing)

    def home(name: str) -> str:
        while name in homes:
            name = homes[name]
        return name

    members: dict[str, list[Box]] = {}
    for box in drawing.boxes:
        members.setdefault(home(box.name), []).append(box)
    boxes = [_joined(box, members[box.name]) for box in drawing.boxes if box.name not in homes]
    half = {box.name: box.half for box in boxes}
    ends = dict.fromkeys((home(arrow.source), home(arrow.target)) for arrow in drawing.arrows)
    return Drawing(tuple(boxes), tuple(Arrow(s, t, half[s] != half[t]) for s, t in ends if s != t))


def _joined(box: Box, members: list[Box]) -> Box:
    counts = Counter(member.title for member in members if member.role not in ("view", "item") or member is box)
    title = " ".join(title if count == 1 else f"{count} {title}" for title, count in counts.items())
    hint = "\n".join(member.hint for member in members)
    return replace(box, title=title, hint=hint, saved=any(member.saved for member in members))


def _made_by(drawing: Drawing) -> dict[str, str]:
    boxes = {box.name: box for box in drawing.boxes}
    return {a.target: a.source for a in drawing.arrows if boxes[a.target].role in ("view", "item")}


def _read_by(drawing: Drawing) -> dict[str, str]:
    boxes = {box.name: box for box in drawing.boxes}
    readers: dict[str, list[str]] = {}
    for arrow in drawing.arrows:
        readers.setdefault(arrow.source, []).append(arrow.target)
    return {
        name: found[0]
        for name, found in readers.items()
        if len(found) == 1
        and _is_plain(boxes[name])
        and not boxes[name].saved
        and _is_plain(boxes[found[0]])
        and boxes[name].half == boxes[found[0]].half
    }


def _is_plain(box: Box) -> bool:
    return box.kind == "node" and box.role == "other" and not box.mark


def _name_weights(drawing: Drawing) -> Drawing:
    inputs = {box.name: box for box in drawing.boxes if box.role in _OF_THE_MODULE}
    modules: dict[str, list[str]] = {}
    for arrow in drawing.arrows:
        if arrow.source in inputs and inputs[arrow.source].role == "weight":
            modules.setdefault(arrow.target, []).append(module_of(inputs[arrow.source].title))
    boxes = [
        replace(box, title=" ".join(filter(None, (box.title, *modules.get(box.name, ())))))
        for box in drawing.boxes
        if box.name not in inputs
    ]
    return Drawing(tuple(boxes), tuple(arrow for arrow in drawing.arrows if arrow.source not in inputs))
