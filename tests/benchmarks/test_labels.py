"""Labels of the plots: none lies over another, and none over a point."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.labels import place_labels

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def overlap(one, other) -> bool:
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])


@pytest.mark.parametrize("seed", range(5))
def test_labels_of_close_points_are_apart(seed) -> None:
    draws = random.Random(seed)
    points = [(draws.uniform(0, 120), draws.uniform(0, 120)) for _ in range(8)]
    boxes = place_labels(points, ["budget0.5"] * 8, 7)
    assert not any(overlap(*pair) for pair in combinations(boxes, 2))
    assert not any(box[0] < x < box[2] and box[1] < y < box[3] for box in boxes for x, y in points)


def test_a_label_with_room_stands_beside_its_point() -> None:
    (box,) = place_labels([(50, 50)], ["budget0.5"], 7)
    assert box[:2] == (53, 53) and place_labels([], [], 7) == []
    (box,) = place_labels([(50, 50)], ["budget0.5"], 7, right=60)
    assert box[2:] == (47, 53 + 1.25 * 7)  # to the left, where the picture ends on the right


def test_the_plot_in_readme_names_every_budget(tmp_path) -> None:
    """Matplotlib notes each text that it draws as a comment: the picture is that of these results."""
    name = "step-1024x4-float32-8x512-r32-cpu"
    drawn = (RESULTS / f"{name}.svg").read_text()
    budgets = [one for one in json.loads((RESULTS / f"{name}.json").read_text())["results"] if "budget" in one]
    assert budgets
    for budget in {one.split("-")[-1] for one in budgets}:
        assert drawn.count(f"<!-- {budget} -->") == 2 * sum(one.endswith(budget) for one in budgets)
