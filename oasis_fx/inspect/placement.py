"""Where the boxes of a layered graph go: layers along the arrows, few crossings, straight lines.

Sugiyama's method with barycentres. Graphviz does it better, but needs a binary that is often missing, and a report
must not fail for that: `oasis-fx print --format dot` is for those who have it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

_SWEEPS = 12


@dataclass(frozen=True)
class Placement:
    """The places of a graph's nodes.

    Attributes:
        column: the middle of each node from left to right, in node widths; the leftmost is at 0.
        layer: of each node, from 0.
        bends: for each arrow, its columns in the layers strictly between its ends.
    """

    column: Mapping[str, float]
    layer: Mapping[str, int]
    bends: Mapping[tuple[str, str], tuple[float, ...]]


def place(nodes: Sequence[str], arrows: Sequence[tuple[str, str]]) -> Placement:
    """Place the nodes of an acyclic graph; they are given in an order in which all arrows point forward."""
    layer = _layers(nodes, arrows)
    # Points: the nodes, and a bend of each arrow in each layer that it passes.
    rows: list[list[Hashable]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for node in nodes:
        rows[layer[node]].append(node)
    above: dict[Hashable, list[Hashable]] = {}
    below: dict[Hashable, list[Hashable]] = {}
    for source, target in arrows:
        passed: list[Hashable] = [(source, target, at) for at in range(layer[source] + 1, layer[target])]
        for point in passed:
            rows[point[2]].append(point)  # type: ignore[index]
        path: list[Hashable] = [source, *passed, target]
        for one, other in pairwise(path):
            below.setdefault(one, []).append(other)
            above.setdefault(other, []).append(one)
    _order(rows, above, below)
    column = _columns(rows, above, below)
    left = min(column.values(), default=0.0)
    bends = {
        (source, target): tuple(column[source, target, at] - left for at in range(layer[source] + 1, layer[target]))
        for source, target in arrows
    }
    return Placement({node: column[node] - left for node in nodes}, layer, bends)


def _layers(nodes: Sequence[str], arrows: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The longest way from a source; a source itself stands right above what reads it."""
    sources: dict[str, list[str]] = {node: [] for node in nodes}
    readers: dict[str, list[str]] = {node: [] for node in nodes}
    for source, target in arrows:
        sources[target].append(source)
        readers[source].append(target)
    layer: dict[str, int] = {}
    for node in nodes:
        layer[node] = max((layer[source] + 1 for source in sources[node]), default=0)
    for node in nodes:
        if not sources[node] and readers[node]:
            layer[node] = min(layer[reader] for reader in readers[node]) - 1
    return layer


def _order(
    rows: list[list[Hashable]],
    above: Mapping[Hashable, Sequence[Hashable]],
    below: Mapping[Hashable, Sequence[Hashable]],
) -> None:
    """Sort each row by the mean place of the neighbours, downwards and upwards in turn; the best order stays."""
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(_SWEEPS):
        neighbours = below if sweep % 2 else above
        for row in reversed(rows) if sweep % 2 else rows:
            place = {point: index for other in rows for index, point in enumerate(other)}
            means = {p: fmean(place[q] for q in neighbours[p]) if p in neighbours else place[p] for p in row}
            row.sort(key=means.__getitem__)
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    rows[:] = best


def _crossings(rows: Sequence[Sequence[Hashable]], below: Mapping[Hashable, Sequence[Hashable]]) -> int:
    crossings = 0
    for upper, lower in pairwise(rows):
        place = {point: index for index, point in enumerate(lower)}
        ends = [end for point in upper for end in sorted(place[reader] for reader in below.get(point, ()))]
        crossings += sum(one > other for index, one in enumerate(ends) for other in ends[index + 1 :])
    return crossings


def _columns(
    rows: Sequence[Sequence[Hashable]],
    above: Mapping[Hashable, Sequence[Hashable]],
    below: Mapping[Hashable, Sequence[Hashable]],
) -> dict[Hashable, float]:
    """Move each point towards its neighbours, in the order and with the distances of its row."""
    column = {point: at for row in rows for point, at in zip(row, _spread(row, [0.0] * len(row)), strict=True)}
    for sweep in range(2 * _SWEEPS):
        for row in reversed(rows) if sweep % 2 else rows:
            wanted = []
            for point in row:
                near = [column[other] for other in (*above.get(point, ()), *below.get(point, ()))]
                wanted.append(fmean(near) if near else column[point])
            column |= zip(row, _spread(row, wanted), strict=True)
    return column


def _spread(row: Sequence[Hashable], wanted: Sequence[float]) -> list[float]:
    """The places nearest to the wanted ones (least squares) that keep order and distances: pooled neighbours."""
    offsets = [0.0]
    for one, other in pairwise(row):
        offsets.append(offsets[-1] + (_width(one) + _width(other)) / 2)
    pools: list[tuple[float, int]] = []  # mean of wanted places less offsets, and how many
    for place, offset in zip(wanted, offsets, strict=False):
        mean, count = place - offset, 1
        while pools and pools[-1][0] > mean:
            other_mean, other_count = pools.pop()
            mean = (mean * count + other_mean * other_count) / (count + other_count)
            count += other_count
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]


def _width(point: Hashable) -> float:
    return 1.0 if isinstance(point, str) else 0.3
