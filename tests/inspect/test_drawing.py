"""Drawings: layers and distances of the layout, what boxes are merged, the Graphviz text."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections import defaultdict
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from oasis_fx.cli.targets import load_target
from oasis_fx.inspect.block import typical_block
from oasis_fx.inspect.dot import format_dot
from oasis_fx.inspect.drawing import Arrow, Box, Drawing, draw
from oasis_fx.inspect.graphs import GRAPHS, graphs
from oasis_fx.inspect.merging import merge_boxes
from oasis_fx.inspect.placement import place
from oasis_fx.inspect.svg import format_svg
from oasis_fx.inspect.text_width import text_width
from oasis_fx.inspect.tracing import trace_model
from oasis_fx.memory.node_costs import saved_storages
from oasis_fx.settings import Settings

BLOCKS = f"{Path(__file__).parent}/two_blocks.py:build"


@pytest.fixture
def shown():
    model, inputs = load_target(BLOCKS)
    (found,) = graphs(trace_model(model, inputs, Settings(rank=2)))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_layout_of_random_graphs(seed) -> None:
    draws = random.Random(seed)
    nodes = [f"n{index}" for index in range(40)]
    arrows = list({(nodes[i], nodes[j]) for i, j in (sorted(draws.sample(range(40), 2)) for _ in range(60))})
    found = place(nodes, arrows)
    assert all(found.layer[source] < found.layer[target] for source, target in arrows)
    rows = defaultdict(list)
    for node in nodes:
        rows[found.layer[node]].append(found.column[node])
    for row in rows.values():
        row.sort()
        assert all(b - a > 1 - 1e-9 for a, b in pairwise(row))
    for (source, target), bends in found.bends.items():
        assert len(bends) == found.layer[target] - found.layer[source] - 1
    assert min(found.column.values()) >= 0 and min(found.layer.values()) == 0
    assert place(nodes, arrows) == found


def test_layout_of_a_ladder_has_no_crossings_and_straight_lines() -> None:
    # Two chains whose nodes come mixed, and one arrow past them all.
    nodes = ["b0", "a0", "a1", "b1", "b2", "a2"]
    arrows = [("a0", "a1"), ("a1", "a2"), ("b0", "b1"), ("b1", "b2")]
    found = place(nodes, arrows)
    for chain in ("a", "b"):
        assert len({round(found.column[f"{chain}{index}"], 6) for index in range(3)}) == 1
    # A source stands right above what reads it.
    late = place(["w", *nodes], [*arrows, ("w", "a2")])
    assert late.layer["w"] == late.layer["a2"] - 1
    assert place([], []).layer == {}


def test_merged_boxes_keep_what_costs(shown) -> None:
    for which, forward in (("before", shown.stock[0]), ("after", shown.forward.graph)):
        whole = draw(shown, which)
        small = merge_boxes(whole)
        assert len(small.boxes) < len(whole.boxes) * 2 / 3
        kept = {box.name for box in small.boxes if box.saved and box.kind == "node"}
        assert kept == {shown.names[name] for name in saved_storages(forward, 1)}
        # Nothing that the passes added or removed is hidden behind another name but views.
        marked = [box for box in whole.boxes if box.mark and box.role != "view"]
        assert marked and all(box in small.boxes or any(box.name == b.name for b in small.boxes) for box in marked)
        titles = " ".join(box.title for box in small.boxes)
        assert ("mm +G up" in titles) == (which == "after") and "mm down" in titles
        names = [box.name for box in small.boxes]
        assert all(names.index(arrow.source) < names.index(arrow.target) for arrow in small.arrows)


def test_what_is_merged() -> None:
    def box(name, role="other", half="forward", kind="node", mark="", saved=False):
        return Box(name, name, "", name, role, half, kind, mark, saved)

    def merged(middle: Box) -> str:
        boxes = (box("x", kind="input", role="input"), middle, box("add"), box("mm", role="matmul"))
        arrows = (Arrow("x", "mul", False), Arrow("mul", "add", False), Arrow("add", "mm", False))
        return ", ".join(found.title for found in merge_boxes(Drawing(boxes, arrows)).boxes)

    assert merged(box("mul")) == "x, mul add, mm"
    assert merged(box("mul", role="view")) == "x, add, mm"
    apart = (box("mul", saved=True), box("mul", mark="+"), box("mul", half="backward"), box("mul", role="matmul"))
    assert {merged(one) for one in (*apart, box("mul", kind="outside"))} == {"x, mul, add, mm"}


def test_svg(shown) -> None:
    drawn = merge_boxes(draw(shown, "after", "layers.1"))
    svg = ElementTree.fromstring(format_svg(drawn))
    boxes = [group for group in svg.iter("g") if "box" in group.get("class", "")]
    assert len(boxes) == len(drawn.boxes)
    assert (
        sum("added" in box.get("class", "") for box in boxes) == 12
    )  # P, C, G, and three boxes of ||X||^2, of two weights
    assert any("outside" in box.get("class", "") for box in boxes)
    assert any("two_blocks.py:15" in (title.text or "") for title in svg.iter("title"))
    width, height = float(svg.get("width", 0)), float(svg.get("height", 0))
    for rect in svg.iter("rect"):
        assert 0 <= float(rect.get("x", -1)) and float(rect.get("x", 0)) + float(rect.get("width", 0)) <= width
        assert 0 <= float(rect.get("y", -1)) and float(rect.get("y", 0)) + float(rect.get("height", 0)) <= height
    # Both P and what the sine keeps cross over from the forward half, which stands on the left.
    crossing = [path.get("d", "") for path in svg.iter("path") if "saved" in path.get("class", "")]
    ends = [[float(number) for number in re.findall(r"(-?[\d.]+),", path)] for path in crossing]
    assert len(ends) == 3 and all(end[0] < end[-1] for end in ends)


def test_texts_stay_within_their_boxes() -> None:
    """By the estimate of widths: what a browser measures, `test_in_a_browser` says."""
    long = Box(
        "n",
        "mm add mul WWWWWWWWWWWWWWWWW",
        "bf16[128, 4096, 11008] 10.8 GiB",
        "",
        "other",
        "forward",
        "node",
        "",
        False,
    )
    svg = ElementTree.fromstring(format_svg(Drawing((long,), ())))
    width = float(svg.find(".//rect").get("width", 0))
    title, detail = (text for text in svg.iter("text") if text.get("class") != "half")
    assert text_width(title.text, 11) <= width - 8 and text_width(detail.text, 9) <= width - 8
    assert title.text.endswith("…") and detail.text.endswith(" 10.8 GiB")  # how much it is, is never left out


def test_boxes_do_not_overlap(shown) -> None:
    svg = ElementTree.fromstring(format_svg(merge_boxes(draw(shown, "after"))))
    places = [tuple(float(rect.get(name)) for name in ("x", "y", "width", "height")) for rect in svg.iter("rect")]
    for (x, y, w, h), (x2, y2, *_) in combinations(places, 2):
        assert abs(x - x2) >= w or abs(y - y2) >= h


@pytest.mark.parametrize("which", GRAPHS)
def test_dot(which, shown, golden) -> None:
    text = format_dot([(which, draw(shown, which))])
    declared = set(re.findall(r'^    "([^"]+)" \[', text, re.M))
    assert {name for edge in re.findall(r'^  "([^"]+)" -> "([^"]+)"', text, re.M) for name in edge} <= declared
    if which == "after":
        golden("blocks-after-dot", text)
        assert text.count("palegreen") > 8 and "penwidth=3]" in text
    if shutil.which("dot"):
        done = subprocess.run(["dot", "-Tsvg"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_several_drawings_are_one_graph(shown) -> None:
    """Graphviz reads the first graph of a file: a second `digraph` behind it would be lost."""
    text = format_dot([(which, draw(shown, which)) for which in GRAPHS])
    assert text.count("digraph") == 1 and text.count("{") == text.count("}")
    declared = re.findall(r'^ +"([^"]+)" \[', text, re.M)
    assert len(declared) == len(set(declared)) == sum(len(draw(shown, which).boxes) for which in GRAPHS)
    ends = {name for edge in re.findall(r'^ +"([^"]+)" -> "([^"]+)"', text, re.M) for name in edge}
    assert ends <= set(declared)
    assert [f'label="{which}";' in text for which in GRAPHS] == [True] * 4
    if shutil.which("dot"):
        done = subprocess.run(["dot", "-Tsvg"], input=text, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("<svg") == 1, done.stderr


def test_typical_block() -> None:
    names = [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("q", "k")]
    assert typical_block(["model.embed.weight", *names]) is None  # the first weight is in no block
    assert typical_block(names) == "model.layers.0"
    assert typical_block(["0.weight", "2.weight"]) is None and typical_block([]) is None
