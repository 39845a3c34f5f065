"""A graph in Graphviz' language."""

from __future__ import annotations

from oasis_fx.inspect.drawing import Arrow, Box, Drawing

_FILL = {"+": "palegreen", "-": "lightsalmon", "": "white"}


def format_dot(drawing: Drawing, title: str = "graph") -> str:
    """Return a drawing in Graphviz' language: halves are clusters, saved values bold, what passes changed coloured."""
    saved = {box.name for box in drawing.boxes if box.saved}
    lines = [f"digraph {_quoted(title)} {{", '  node [shape=box, style=filled, fillcolor=white, fontname="Helvetica"];']
    for half in ("forward", "backward"):
        boxes = [box for box in drawing.boxes if box.half == half]
        lines += [f"  subgraph {_quoted(f'cluster_{half}')} {{", f"    label={half};"]
        lines += [f"    {_node(box)}" for box in boxes]
        lines.append("  }")
    lines += [f"  {_edge(arrow, arrow.source in saved)}" for arrow in drawing.arrows]
    return "\n".join([*lines, "}"]) + "\n"


def _node(box: Box) -> str:
    label = "\\n".join(_escaped(line) for line in (f"{box.name}: {box.title}", box.detail) if line)
    looks = [f'label="{label}"', f"tooltip={_quoted(box.hint)}", f"fillcolor={_FILL[box.mark[:1]]}"]
    if box.kind != "node":
        looks.append("shape=ellipse" if box.kind == "input" else 'style="filled,dashed"')
    if box.saved:
        looks.append("penwidth=3")
    return f"{_quoted(box.name)} [{', '.join(looks)}];"


def _edge(arrow: Arrow, saved: bool) -> str:
    looks = " [style=bold, penwidth=3]" if arrow.crossing and saved else " [style=dashed]" if arrow.crossing else ""
    return f"{_quoted(arrow.source)} -> {_quoted(arrow.target)}{looks};"


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
