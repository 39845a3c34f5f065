"""Graphs in Graphviz' language."""

from __future__ import annotations

from collections.abc import Sequence

from oasis_fx.inspect.drawing import Arrow, Box, Drawing

_FILL = {"+": "palegreen", "-": "lightsalmon", "": "white"}


def format_dot(drawings: Sequence[tuple[str, Drawing]]) -> str:
    """Return drawings in Graphviz' language, as one graph.

    Halves are clusters, saved values bold, what passes changed coloured. Of several drawings each is a cluster with its
    title, and the names of its nodes begin with its number.

    Args:
        drawings: each with its title.
    """
    title = drawings[0][0] if len(drawings) == 1 else "graphs"
    lines = [f"digraph {_quoted(title)} {{", '  node [shape=box, style=filled, fillcolor=white, fontname="Helvetica"];']
    for number, (title, drawing) in enumerate(drawings, 1):
        if len(drawings) == 1:
            lines += _drawing(drawing, "")
            continue
        lines += [f"  subgraph {_quoted(f'cluster_{number}')} {{", f"    label={_quoted(title)};"]
        lines += [f"  {line}" for line in _drawing(drawing, f"{number}/")]
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


def _drawing(drawing: Drawing, prefix: str) -> list[str]:
    saved = {box.name for box in drawing.boxes if box.saved}
    lines = []
    for half in ("forward", "backward"):
        boxes = [box for box in drawing.boxes if box.half == half]
        lines += [f"  subgraph {_quoted(f'cluster_{prefix}{half}')} {{", f"    label={half};"]
        lines += [f"    {_node(box, prefix)}" for box in boxes]
        lines.append("  }")
    return lines + [f"  {_edge(arrow, arrow.source in saved, prefix)}" for arrow in drawing.arrows]


def _node(box: Box, prefix: str) -> str:
    label = "\\n".join(_escaped(line) for line in (f"{box.name}: {box.title}", box.detail) if line)
    looks = [f'label="{label}"', f"tooltip={_quoted(box.hint)}", f"fillcolor={_FILL[box.mark[:1]]}"]
    if box.kind != "node":
        looks.append("shape=ellipse" if box.kind == "input" else 'style="filled,dashed"')
    if box.saved:
        looks.append("penwidth=3")
    return f"{_quoted(prefix + box.name)} [{', '.join(looks)}];"


def _edge(arrow: Arrow, saved: bool, prefix: str) -> str:
    looks = " [style=bold, penwidth=3]" if arrow.crossing and saved else " [style=dashed]" if arrow.crossing else ""
    return f"{_quoted(prefix + arrow.source)} -> {_quoted(prefix + arrow.target)}{looks};"


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
