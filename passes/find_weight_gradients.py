"""Find the weight gradients that are matmuls of an activation with an incoming gradient.

    gradient of W  <-  views, transposes, casts  <-  dY^T[m,N] @ X[N,n]
                                                      |           +-- computed without any incoming gradient
                                                      +-- computed from one

A weight that is used several times has the sum of such matmuls as its gradient, one that is used in parts what puts the
gradients of the parts together (`oasis_fx.passes.matchers.gradient_parts`). Batched and grouped matmuls of experts, and
convolutions, count as matmuls. The match is by what a node computes and depends on, not by the module or function that
the user called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from oasis_fx._torch.joint_graphs import gradient_positions, input_placeholders, is_tangent
from oasis_fx.graph.edits import aten, dependents, outputs, shape, value
from oasis_fx.graph.facts import Contraction, JointFacts, Kind, Skipped, WeightGradient
from oasis_fx.graph.matricization import row_dims
from oasis_fx.passes.matchers.contractions import Goal, NoMatch, contraction
from oasis_fx.passes.matchers.dimension_labels import (
    RESHAPES,
    SAME_SHAPE,
    TRANSPOSES,
    Labels,
    equal,
    first_labels,
    labels_behind,
)
from oasis_fx.passes.matchers.gradient_parts import gradient_parts, is_zero


def find_weight_gradients(gm: fx.GraphModule, facts: JointFacts) -> JointFacts:
    """Find the gradients of ``facts.lifted`` that can be rewritten, and why the others cannot. Changes nothing.

    Requires: ``gm`` is a joint graph of AOTAutograd with descriptors.
    """
    graph = gm.graph
    positions = gradient_positions(graph)
    values = outputs(graph)
    placeholders = input_placeholders(graph)
    from_tangents = dependents(n for n in graph.find_nodes(op="placeholder") if is_tangent(n))
    sites: list[WeightGradient] = []
    skipped: list[Skipped] = []
    for weight in facts.lifted:
        try:
            position = positions.get(weight.weight)
            if position is None or not isinstance(values[position], fx.Node):
                raise NoMatch("no gradient reaches it in this graph")
            if weight.slot not in positions or weight.basis not in positions:
                raise NoMatch("AOTAutograd gave the runtime's inputs no place among the gradients")
            sizes = shape(values[position])
            rows = tuple(row_dims(len(sizes), weight.features))
            goal = Goal(rows, tuple(range(*weight.features)), sizes, from_tangents)
            blocks = _blocks(values[position], first_labels(sizes), goal)
            rank = shape(placeholders[weight.slot])[1]
            terms = [term for block in blocks for term in block.terms]
            if not terms:
                raise NoMatch("its gradient is zero in this graph")
            for term in terms:
                _check_worth(term, rank)
                if weight.control is not None and term.kind is Kind.CONVOLUTION:
                    raise NoMatch("its rule reads the rows of X, and the patches of a convolution are never laid out")
            others = _product([sizes[dim] for dim in goal.rows[1:]])
            counts = tuple(block.count * others for block in blocks)
            sites.append(WeightGradient(weight, position, tuple(block.terms for block in blocks), counts))
        except NoMatch as miss:
            skipped.append(Skipped(weight.weight, str(miss)))
    return replace(facts, sites=tuple(sites), skipped=tuple(skipped))


@dataclass(frozen=True)
class _Block:
    """Some of the weight's slowest rows, and what their gradient is the sum of."""

    count: Any
    terms: tuple[Contraction, ...]


def _blocks(node: fx.Node, labels: Labels, goal: Goal) -> list[_Block]:
    """Split a gradient into blocks of rows and those into contractions, or raise NoMatch."""
    node, labels = _peel(node, labels, goal)
    if is_zero(node):
        return [_Block(goal.sizes[goal.rows[0]], ())]
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        summands = [part for part in node.args if isinstance(part, fx.Node) and len(shape(part)) == len(labels)]
        if len(summands) != 2:
            raise NoMatch(f"its gradient is a sum of which a part is not a matrix ({node.name})")
        return _added(*(_blocks(part, labels, goal) for part in summands))
    parts = gradient_parts(node, labels, goal.rows, goal.sizes)
    if parts is None:
        return [_Block(goal.sizes[goal.rows[0]], (contraction(node, labels, goal),))]
    if not parts:
        raise NoMatch(f"its gradient is put together along its features, or from parts of rows ({node.name})")
    blocks = []
    for part in parts:
        sizes = list(goal.sizes)
        sizes[goal.rows[0]] = part.count
        if part.node is None:
            blocks.append(_Block(part.count, ()))
        else:
            blocks += _blocks(part.node, part.labels, replace(goal, sizes=tuple(sizes)))
    return blocks


def _added(one: list[_Block], other: list[_Block]) -> list[_Block]:
    """The sum of two gradients of the same rows; blocks that meet must be of one size, or empty."""
    left, right, total = list(one), list(other), []
    while left and right:
        first, second = left.pop(0), right.pop(0)
        if not equal(first.count, second.count):
            longer, rest = (first, left) if statically_known_true(first.count > second.count) else (second, right)
            if longer.terms:
                raise NoMatch("it is used in parts that overlap")
            shorter = second if longer is first else first
            rest.insert(0, _Block(longer.count - shorter.count, ()))
            first, second = shorter, _Block(shorter.count, ())
        total.append(_Block(first.count, first.terms + second.terms))
    return total


def _check_worth(term: Contraction, rank: Any) -> None:
    """Raise NoMatch where P cannot be computed, or is no smaller than X."""
    if term.kind is Kind.GROUPED and term.dense.target is aten._grouped_mm.default:
        if rank * value(term.x).element_size() % 16:
            raise NoMatch(f"its grouped matmul needs rows of a multiple of 16 bytes, which rank {rank} does not give")
    if term.kind is Kind.CONVOLUTION:
        channels, *inside = shape(term.x)[1:]
        if statically_known_true(rank * _product(shape(term.dy)[2:]) > channels * _product(inside)):
            raise NoMatch("the patches of its convolution overlap: P would be larger than X")


def _product(sizes: Sequence[Any]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _peel(node: fx.Node, labels: Labels, goal: Goal) -> tuple[fx.Node, Labels]:
    """Follow views, transposes and casts back to what computes the values."""
    while node.op == "call_function" and node.target in (*SAME_SHAPE, *RESHAPES, *TRANSPOSES):
        before = labels_behind(node, labels, goal.sizes)
        if before is None:
            raise NoMatch(f"its gradient is reshaped in a way that mixes dimensions ({node.name})")
        node, labels = node.all_input_nodes[0], before
    return node, labels
