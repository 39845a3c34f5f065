"""Find the weight gradients that are matmuls of an activation with an incoming gradient.

    slot of W  <-  views, transposes, casts  <-  dY^T[m,N] @ X[N,n]
                                                  |           +-- computed without any incoming gradient
                                                  +-- computed from one

A weight that is used several times has the sum of such matmuls in its slot. The match is by what a node
computes and depends on, not by the module or function that the user called.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from oasis_fx.graph import (
    Contraction,
    LiftedWeight,
    Skipped,
    WeightGradient,
    aten,
    dependents,
    outputs,
    prims,
    shape,
)
from oasis_fx.torch_private import gradient_positions, is_tangent

# Which dimension of the weight's slot each dimension of a node is: 0, 1, or None for one of size 1.
Labels = tuple[int | None, ...]

_SAME_SHAPE = (
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.contiguous.default,
    aten._to_copy.default,
    prims.convert_element_type.default,
)
_RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)


class _NoMatch(Exception):
    """A gradient is not what this analysis looks for; the message is the reason the user reads."""


def find_weight_gradients(
    graph: fx.Graph, lifted: Sequence[LiftedWeight]
) -> tuple[tuple[WeightGradient, ...], tuple[Skipped, ...]]:
    """Return the rewritable gradients of ``lifted`` weights, and the others with the reason. Changes nothing.

    Requires: ``graph`` is a joint graph of AOTAutograd with descriptors.
    """
    positions = gradient_positions(graph)
    values = outputs(graph)
    from_tangents = dependents(n for n in graph.find_nodes(op="placeholder") if is_tangent(n))
    sites: list[WeightGradient] = []
    skipped: list[Skipped] = []
    for weight in lifted:
        try:
            position = positions.get(weight.weight)
            if position is None or not isinstance(values[position], fx.Node):
                raise _NoMatch("no gradient reaches it in this graph")
            if weight.slot not in positions or weight.basis not in positions:
                raise _NoMatch("AOTAutograd gave no gradient slot to the runtime's inputs")
            labels: Labels = (1, 0) if weight.transposed else (0, 1)  # dimension 0 is m, dimension 1 is n
            terms = tuple(_contractions(values[position], labels, from_tangents))
            sites.append(WeightGradient(weight, position, terms))
        except _NoMatch as miss:
            skipped.append(Skipped(weight.weight, str(miss)))
    return tuple(sites), tuple(skipped)


def _contractions(node: fx.Node, labels: Labels, from_tangents: set[fx.Node]) -> list[Contraction]:
    """Split the gradient ``node`` into contractions, or raise _NoMatch."""
    node, labels = _peel(node, labels)
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        parts = [part for part in node.args if isinstance(part, fx.Node) and len(shape(part)) == len(labels)]
        if len(parts) != 2:
            raise _NoMatch(f"its gradient is a sum with something that is no matrix ({node.name})")
        return [term for part in parts for term in _contractions(part, labels, from_tangents)]
    left, right = _operands(node)
    (row, column) = _two_labels(labels)
    left_moves, right_moves = left in from_tangents, right in from_tangents
    if left_moves == right_moves:
        how = "both operands depend" if left_moves else "no operand depends"
        raise _NoMatch(f"{how} on an incoming gradient in its gradient matmul ({node.name})")
    # left is [row, K], right is [K, column]; the m side must be dY and the n side X.
    if left_moves:
        if (row, column) != (0, 1):
            raise _NoMatch(f"its activation meets the out dimension in {node.name}")
        (dy, dy_transposed), (x, x_transposed) = _untranspose(left, True), _untranspose(right, False)
    else:
        if (row, column) != (1, 0):
            raise _NoMatch(f"its activation meets the out dimension in {node.name}")
        (dy, dy_transposed), (x, x_transposed) = _untranspose(right, False), _untranspose(left, True)
    return [Contraction(node, dy, dy_transposed, x, x_transposed)]


def _peel(node: fx.Node, labels: Labels) -> tuple[fx.Node, Labels]:
    """Follow views, transposes and casts back to what computes the values."""
    while node.op == "call_function" and node.target in (*_SAME_SHAPE, *_RESHAPES, *_TRANSPOSES):
        source = node.all_input_nodes[0]
        if node.target in _TRANSPOSES:
            labels = _labels_before_permute(labels, _permutation(node))
        elif node.target in _RESHAPES:
            labels = _labels_before_reshape(node, source, labels)
        node = source
    return node, labels


def _labels_before_permute(labels: Labels, permutation: Sequence[int]) -> Labels:
    before: list[int | None] = [None] * len(labels)
    for out_dim, in_dim in enumerate(permutation):
        before[in_dim] = labels[out_dim]
    return tuple(before)


def _labels_before_reshape(node: fx.Node, source: fx.Node, labels: Labels) -> Labels:
    """Carry labels over a reshape that only adds or removes dimensions of size 1."""
    after, before = shape(node), shape(source)
    if len(after) == len(before) and all(_equal(a, b) for a, b in zip(after, before, strict=True)):
        return labels
    wide = [(size, label) for size, label in zip(after, labels, strict=True) if not _equal(size, 1)]
    result: list[int | None] = []
    for size in before:
        result.append(None if _equal(size, 1) else wide.pop(0)[1] if wide and _equal(size, wide[0][0]) else -1)
    if wide or -1 in result:
        raise _NoMatch(f"its gradient is reshaped in a way that mixes dimensions ({node.name})")
    return tuple(result)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two matrices that ``node`` contracts, as [.., K] and [K, ..]."""
    if node.target is aten.mm.default:
        return node.args[0], node.args[1]  # type: ignore[return-value]
    if node.target is aten.bmm.default and _equal(shape(node)[0], 1):
        return node.args[0], node.args[1]  # type: ignore[return-value]
    if node.target is aten.mul.Tensor and len(shape(node)) == 2:
        # A batch of one token: Inductor turns the matmul [m,1] @ [1,n] into a broadcast product.
        left, right = node.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and len(shape(left)) == len(shape(right)) == 2:
            for one, other in ((left, right), (right, left)):
                if _equal(shape(one)[1], 1) and _equal(shape(other)[0], 1):
                    return one, other
    raise _NoMatch(f"its gradient is no matmul but {node.target} ({node.name})")


def _two_labels(labels: Labels) -> tuple[int | None, int | None]:
    """Labels of the matrix dimensions; where one has size 1 it is the one that is left over."""
    row, column = labels[-2:]
    if row is None and column is not None:
        row = 1 - column
    elif column is None and row is not None:
        column = 1 - row
    elif row is None and column is None:
        row, column = 0, 1
    return row, column


def _untranspose(node: fx.Node, transposed: bool) -> tuple[fx.Node, bool]:
    """See through a transpose of a matrix: the node behind it is the one that the forward pass made."""
    while node.op == "call_function" and node.target in _TRANSPOSES and len(shape(node)) == 2:
        if tuple(_permutation(node)) == (1, 0):
            transposed = not transposed
        node = node.all_input_nodes[0]
    return node, transposed


def _permutation(node: fx.Node) -> Sequence[int]:
    rank = len(shape(node))
    if node.target is aten.permute.default:
        return [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
    order = list(range(rank))
    if node.target is aten.t.default:
        return order[::-1]
    first, second = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return order


def _equal(one: object, other: object) -> bool:
    return statically_known_true(one == other)
