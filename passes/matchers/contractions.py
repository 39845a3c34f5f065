"""Recognise a node that contracts dY with X: the one operand descends from an incoming gradient, the other does not.

    mm([m,N], [N,n])                    an nn.Linear               bmm([e,m,N], [e,N,n])        experts, one batch
    mul([m,1], [1,n])                   a batch of one token       _grouped_mm([m,N], [N,n])    experts, by offsets
    convolution_backward(dY, X)[1]      a convolution

The match is by what a node computes and depends on, not by the module or function that the user called.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from oasis_fx.graph.edits import aten, shape
from oasis_fx.graph.facts import Contraction, Kind
from oasis_fx.passes.matchers.dimension_labels import TRANSPOSES, Labels, Sizes, equal, first_labels, permutation

_GROUPED_BACKWARD = "transformers.grouped_mm_fallback_backward.default"


class NoMatch(Exception):
    """A gradient cannot be rewritten; the message is the reason that the user reads in the report."""


@dataclass(frozen=True)
class Goal:
    """What a node must be the gradient of: the weight (or a part of its rows), as rows and features."""

    rows: tuple[int, ...]
    features: tuple[int, ...]
    sizes: Sizes
    from_tangents: set[fx.Node]

    def label(self, dims: Sequence[int]) -> tuple[int, ...]:
        return tuple(dim for dim in dims if not equal(self.sizes[dim], 1))


def contraction(node: fx.Node, labels: Labels, goal: Goal) -> Contraction:
    """Return the contraction of dY with X that ``node`` computes, whose dimensions ``labels`` names.

    Raises:
        NoMatch: it computes something else, or not the gradient of the goal's rows and features.
    """
    if node.target is operator.getitem and node.args[1] == 1:
        maker = node.all_input_nodes[0]
        if maker.target is aten.convolution_backward.default:
            return _convolution(node, maker, labels, goal)
        if str(maker.target) == _GROUPED_BACKWARD:
            x, _, _, dy = maker.all_input_nodes
            return _matmul(Kind.GROUPED, node, (x, True), (dy, False), labels, goal)
    kind, left, right = _operands(node)
    return _matmul(kind, node, (left, False), (right, False), labels, goal)


def _matmul(
    kind: Kind, node: fx.Node, left: tuple[fx.Node, bool], right: tuple[fx.Node, bool], labels: Labels, goal: Goal
) -> Contraction:
    """Left is [.., row, K] and right [.., K, column], or swapped; one is dY and the other X."""
    batch, row, column = labels[-3] if len(labels) == 3 else (), labels[-2], labels[-1]
    rows, features = goal.rows, goal.label(goal.features)
    if kind in (Kind.BATCHED, Kind.GROUPED):
        if batch != goal.label(rows[:1]):
            raise NoMatch(f"its experts are not a dimension of their own in its gradient matmul ({node.name})")
        rows = rows[1:]
    left_moves, right_moves = left[0] in goal.from_tangents, right[0] in goal.from_tangents
    if left_moves == right_moves:
        how = "both operands depend" if left_moves else "no operand depends"
        raise NoMatch(f"{how} on an incoming gradient in its gradient matmul ({node.name})")
    # The side of the rows must be dY's and the side of the features X's.
    if (row, column) != ((goal.label(rows), features) if left_moves else (features, goal.label(rows))):
        raise NoMatch(f"its gradient matmul pairs its activation with its out dimension ({node.name})")
    left_node, left_swapped = _untranspose(left[0], not left[1])
    right_node, right_swapped = _untranspose(right[0], right[1])
    # dY is wanted as [N, m] and X as [N, n]: the left one is the other way round.
    if left_moves:
        return Contraction(kind, node, left_node, left_swapped, right_node, right_swapped)
    return Contraction(kind, node, right_node, right_swapped, left_node, left_swapped)


def _convolution(node: fx.Node, maker: fx.Node, labels: Labels, goal: Goal) -> Contraction:
    dy, x, *_, transposed, _, groups, _ = maker.args
    assert isinstance(dy, fx.Node) and isinstance(x, fx.Node)
    if transposed or groups != 1:
        raise NoMatch(f"a convolution that is transposed or has groups reads it ({maker.name})")
    if labels != first_labels(goal.sizes) or goal.features != tuple(range(1, len(goal.sizes))):
        raise NoMatch(f"its gradient is that of a convolution, reshaped or transposed ({node.name})")
    if x in goal.from_tangents or dy not in goal.from_tangents:
        raise NoMatch(f"its convolution does not run over an activation ({maker.name})")
    return Contraction(Kind.CONVOLUTION, node, dy, False, x, False)


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
    raise NoMatch(f"its gradient is computed by {node.target}, which is not a matmul ({node.name})")


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
