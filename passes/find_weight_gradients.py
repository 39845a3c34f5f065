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

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from oasis_fx._torch.joint_graphs import gradient_positions, input_placeholders, is_tangent
from oasis_fx.graph.edits import aten, dependents, outputs, shape, value
from oasis_fx.graph.facts import Contraction, JointFacts, Kind, Skipped, WeightGradient
from oasis_fx.graph.matricization import row_dims
from oasis_fx.passes.matchers.dimension_labels import (
    RESHAPES,
    SAME_SHAPE,
    TRANSPOSES,
    Labels,
    Sizes,
    equal,
    first_labels,
    labels_behind,
    permutation,
)
from oasis_fx.passes.matchers.gradient_parts import gradient_parts, is_zero

GROUPED_BACKWARD = "transformers.grouped_mm_fallback_backward.default"


class _NoMatch(Exception):
    """A gradient is not what this analysis looks for; the message is the reason the user reads."""


@dataclass(frozen=True)
class _Goal:
    """What a node must be the gradient of: the weight (or a part of its rows), as rows and features."""

    rows: tuple[int, ...]
    features: tuple[int, ...]
    sizes: Sizes
    from_tangents: set[fx.Node]

    def label(self, dims: Sequence[int]) -> tuple[int, ...]:
        return tuple(dim for dim in dims if not equal(self.sizes[dim], 1))


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
                raise _NoMatch("no gradient reaches it in this graph")
            if weight.slot not in positions or weight.basis not in positions:
                raise _NoMatch("AOTAutograd gave the runtime's inputs no place among the gradients")
            sizes = shape(values[position])
            rows = tuple(row_dims(len(sizes), weight.features))
            goal = _Goal(rows, tuple(range(*weight.features)), sizes, from_tangents)
            blocks = _blocks(values[position], first_labels(sizes), goal)
            rank = shape(placeholders[weight.slot])[1]
            terms = [term for block in blocks for term in block.terms]
            if not terms:
                raise _NoMatch("its gradient is zero in this graph")
            for term in terms:
                _check_worth(term, rank)
                if weight.control is not None and term.kind is Kind.CONVOLUTION:
                    raise _NoMatch("this rule reads the rows of X, and a convolution's patches are never laid out")
            others = _product([sizes[dim] for dim in goal.rows[1:]])
            counts = tuple(block.count * others for block in blocks)
            sites.append(WeightGradient(weight, position, tuple(block.terms for block in blocks), counts))
        except _NoMatch as miss:
            skipped.append(Skipped(weight.weight, str(miss)))
    return replace(facts, sites=tuple(sites), skipped=tuple(skipped))


@dataclass(frozen=True)
class _Block:
    """Some of the weight's slowest rows, and what their gradient is the sum of."""

    count: Any
    terms: tuple[Contraction, ...]


def _blocks(node: fx.Node, labels: Labels, goal: _Goal) -> list[_Block]:
    """Split a gradient into blocks of rows and those into contractions, or raise _NoMatch."""
    node, labels = _peel(node, labels, goal)
    if is_zero(node):
        return [_Block(goal.sizes[goal.rows[0]], ())]
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        summands = [part for part in node.args if isinstance(part, fx.Node) and len(shape(part)) == len(labels)]
        if len(summands) != 2:
            raise _NoMatch(f"its gradient is a sum with something that is no matrix ({node.name})")
        return _added(*(_blocks(part, labels, goal) for part in summands))
    parts = gradient_parts(node, labels, goal.rows, goal.sizes)
    if parts is None:
        return [_Block(goal.sizes[goal.rows[0]], (_contraction(node, labels, goal),))]
    if not parts:
        raise _NoMatch(f"its gradient is put together along its features, or of parts of rows ({node.name})")
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
                raise _NoMatch("it is used in parts that overlap")
            shorter = second if longer is first else first
            rest.insert(0, _Block(longer.count - shorter.count, ()))
            first, second = shorter, _Block(shorter.count, ())
        total.append(_Block(first.count, first.terms + second.terms))
    return total


def _contraction(node: fx.Node, labels: Labels, goal: _Goal) -> Contraction:
    """The matmul that a gradient is, or raise _NoMatch."""
    if node.target is operator.getitem and node.args[1] == 1:
        maker = node.all_input_nodes[0]
        if maker.target is aten.convolution_backward.default:
            return _convolution(node, maker, labels, goal)
        if str(maker.target) == GROUPED_BACKWARD:
            x, _, _, dy = maker.all_input_nodes
            return _matmul(Kind.GROUPED, node, (x, True), (dy, False), labels, goal)
    kind, left, right = _operands(node)
    return _matmul(kind, node, (left, False), (right, False), labels, goal)


def _matmul(
    kind: Kind, node: fx.Node, left: tuple[fx.Node, bool], right: tuple[fx.Node, bool], labels: Labels, goal: _Goal
) -> Contraction:
    """Left is [.., row, K] and right [.., K, column], or swapped; one is dY and the other X."""
    batch, row, column = labels[-3] if len(labels) == 3 else (), labels[-2], labels[-1]
    rows, features = goal.rows, goal.label(goal.features)
    if kind in (Kind.BATCHED, Kind.GROUPED):
        if batch != goal.label(rows[:1]):
            raise _NoMatch(f"its experts are no dimension of their own in {node.name}")
        rows = rows[1:]
    left_moves, right_moves = left[0] in goal.from_tangents, right[0] in goal.from_tangents
    if left_moves == right_moves:
        how = "both operands depend" if left_moves else "no operand depends"
        raise _NoMatch(f"{how} on an incoming gradient in its gradient matmul ({node.name})")
    # The side of the rows must be dY's and the side of the features X's.
    if (row, column) != ((goal.label(rows), features) if left_moves else (features, goal.label(rows))):
        raise _NoMatch(f"its activation meets the out dimension in {node.name}")
    left_node, left_swapped = _untranspose(left[0], not left[1])
    right_node, right_swapped = _untranspose(right[0], right[1])
    # dY is wanted as [N, m] and X as [N, n]: the left one is the other way round.
    if left_moves:
        return Contraction(kind, node, left_node, left_swapped, right_node, right_swapped)
    return Contraction(kind, node, right_node, right_swapped, left_node, left_swapped)


def _convolution(node: fx.Node, maker: fx.Node, labels: Labels, goal: _Goal) -> Contraction:
    dy, x, *_, transposed, _, groups, _ = maker.args
    assert isinstance(dy, fx.Node) and isinstance(x, fx.Node)
    if transposed or groups != 1:
        raise _NoMatch(f"a convolution that is transposed or has groups reads it ({maker.name})")
    if labels != first_labels(goal.sizes) or goal.features != tuple(range(1, len(goal.sizes))):
        raise _NoMatch(f"its gradient is a convolution's that is reshaped or transposed ({node.name})")
    if x in goal.from_tangents or dy not in goal.from_tangents:
        raise _NoMatch(f"its convolution does not run over an activation ({maker.name})")
    return Contraction(Kind.CONVOLUTION, node, dy, False, x, False)


def _check_worth(term: Contraction, rank: Any) -> None:
    """Raise _NoMatch where P cannot be computed, or is no smaller than X."""
    if term.kind is Kind.GROUPED and term.dense.target is aten._grouped_mm.default:
        if rank * value(term.x).element_size() % 16:
            raise _NoMatch(f"its grouped matmul takes rows of whole 16 bytes: not rank {rank}")
    if term.kind is Kind.CONVOLUTION:
        channels, *inside = shape(term.x)[1:]
        if statically_known_true(rank * _product(shape(term.dy)[2:]) > channels * _product(inside)):
            raise _NoMatch("the patches of its convolution overlap: P would be larger than X")


def _product(sizes: Sequence[Any]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _peel(node: fx.Node, labels: Labels, goal: _Goal) -> tuple[fx.Node, Labels]:
    """Follow views, transposes and casts back to what computes the values."""
    while node.op == "call_function" and node.target in (*SAME_SHAPE, *RESHAPES, *TRANSPOSES):
        before = labels_behind(node, labels, goal.sizes)
        if before is None:
            raise _NoMatch(f"its gradient is reshaped in a way that mixes dimensions ({node.name})")
        node, labels = node.all_input_nodes[0], before
    return node, labels


def _operands(node: fx.Node) -> tuple[Kind, fx.Node, fx.Node]:
    """The two matrices that ``node`` contracts, as [.., K] and [K, ..]."""
    if node.target is aten.mm.default:
        return Kind.MATMUL, node.args[0], node.args[1]  # type: ignore[return-value]
    if node.target is aten.bmm.default:
        kind = Kind.MATMUL if equal(shape(node)[0], 1) else Kind.BATCHED
        return kind, node.args[0], node.args[1]  # type: ignore[return-value]
    if node.target is aten._grouped_mm.default and len(shape(node)) == 3:
        return Kind.GROUPED, node.args[0], node.args[1]  # type: ignore[return-value]
    if node.target is aten.mul.Tensor and len(shape(node)) == 2:
        # A batch of one token: Inductor turns the matmul [m,1] @ [1,n] into a broadcast product.
        left, right = node.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and len(shape(left)) == len(shape(right)) == 2:
            for one, other in ((left, right), (right, left)):
                if equal(shape(one)[1], 1) and equal(shape(other)[0], 1):
                    return Kind.MATMUL, one, other
    raise _NoMatch(f"its gradient is no matmul but {node.target} ({node.name})")


def _untranspose(node: fx.Node, transposed: bool) -> tuple[fx.Node, bool]:
    """See through a transpose of matrices: the node behind it is the one that the forward pass made."""
    while node.op == "call_function" and node.target in TRANSPOSES:
        order = tuple(permutation(node))
        last = len(order) - 1
        if order == (*range(last - 1), last, last - 1):
            transposed = not transposed
        elif order != tuple(range(last + 1)):
            break
        node = node.all_input_nodes[0]
    return node, transposed
