"""How wide a text is drawn: an estimate, since only a browser knows its fonts."""

from __future__ import annotations

# Advance widths of DejaVu Sans, which is wider than what browsers take on other systems, in parts of the font's size.
_WIDTHS = {
    0.3: "'ijlIJ",
    0.35: ",. /:;\\|f-",
    0.42: "t()[]!r",
    0.5: '"*_`',
    0.56: "szckFLvxy?",
    0.62: "Paobdeghnpqu$TY",
    0.65: "0123456789{}ESKAVBXZR",
    0.72: "CU&",
    0.78: "HNDGOQ",
    0.85: "w#+<=>^~",
}
_WIDTH_OF = {character: width for width, characters in _WIDTHS.items() for character in characters}
_WIDEST = 1.0


def text_width(text: str, size: float) -> float:
    """Return how many pixels a line of text takes at most, in a sans-serif font of a size in pixels."""
    return size * sum(_WIDTH_OF.get(character, _WIDEST) for character in text)


def shortened(text: str, size: float, room: float) -> str:
    """Return the text, or as much of its beginning as there is room for, with an ellipsis behind it."""
    if text_width(text, size) <= room:
        return text
    while text and text_width(f"{text}…", size) > room:
        text = text[:-1]
    return f"{text.rstrip()}…"


def shape_and_size(text: str, size: float, room: float) -> str:
    """Return a shape and its bytes, ``f32[4, 256] 4.0 KiB``, in the room that there is: its bytes are never cut off."""
    if text_width(text, size) <= room:
        return text
    text = text.replace(", ", ",")
    shape, bracket, num_bytes = text.rpartition("] ")
    if not bracket or text_width(text, size) <= room:
        return shortened(text, size, room)
    return f"{shortened(shape, size, room - text_width(f' {num_bytes}', size))} {num_bytes}"
