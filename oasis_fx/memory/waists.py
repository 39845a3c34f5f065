"""Where a forward pass is narrow: one tensor, such as a residual stream, is all that goes on from there."""

from __future__ import annotations

import math
import statistics

from torch import fx

from oasis_fx.memory.save_problem import SaveProblem, tensor_bytes


def waists_to_keep(problem: SaveProblem, budget: int) -> list[fx.Node]:
    """Choose waists of a forward pass to keep whatever else is kept, as many as a budget in bytes holds.

    Without one, a value near the end is recomputed from the start, at once, and all that it passes on the way is
    held until its own turn comes: few bytes saved, and the peak as if all were.
    """
    places = waists(problem)
    sizes = {node: tensor_bytes(node) for node in places}
    way, prices = 0.0, {}  # of all that comes before
    for node in problem.needs:
        if node in problem.required and problem.price[node] < math.inf:
            way += problem.price[node]
        prices[node] = way
    segments = len(places) // 2  # a transformer's block has two waists: behind its attention and behind its MLP
    while segments > 0:
        shortest = 0.9 * prices[places[-1]] / segments
        chosen, start = [], 0.0
        for node in places:
            if prices[node] - start >= shortest:
                chosen.append(node)
                start = prices[node]
        if sum(sizes[node] for node in chosen) <= budget:
            return chosen
        segments //= 2
    return []


def waists(problem: SaveProblem) -> list[fx.Node]:
    """Return the values through which all of a forward pass goes, in its order.

    Hardly anything else is made before such a value and read after it.
    """
    values = [node for node in problem.needs if node in problem.required]
    position = {node: index for index, node in enumerate(values)}
    last = dict(position)
    for node in values:
        for source in problem.needs[node]:
            if source in last:
                last[source] = max(last[source], position[node])
    # Masks, rotary tables, an encoder's output: what much of the graph reads is no matter of one place.
    size = {node: tensor_bytes(node) for node in values if last[node] - position[node] <= len(values) / 3}
    ends: dict[int, int] = {}
    crossing, found = 0, []
    for node in values:
        crossing -= ends.pop(position[node], 0)
        if node not in size:
            continue
        if last[node] > position[node] and crossing <= size[node] / 10:
            found.append(node)
        crossing += size[node]
        ends[last[node]] = ends.get(last[node], 0) + size[node]
    # Logits are a waist too, and no place to keep.
    usual = statistics.median(size[node] for node in found) if found else 0
    return [node for node in found if 0 < size[node] <= 4 * usual and problem.bytes_held[node] < math.inf]
