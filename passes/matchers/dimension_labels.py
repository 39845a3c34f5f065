"""Follow the dimensions of a weight gradient back through views, to what computes its values.

A label says, for each dimension of a node, which dimensions of the weight it runs over, slowest first:

    permute(mm)      [n,m] of a weight [n,m]                  ((0,), (1,))
    mm               [m,n], the node behind                   ((1,), (0,))
    view(mm)         [heads,dim,n] of a weight of that shape  ((0,), (1,), (2,))
    mm               [heads*dim,n], the node behind           ((0, 1), (2,))

Dimensions of size 1 have the empty label: views move them freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from oasis_fx.graph.edits import aten, prims, shape

Labels = tuple[tuple[int, ...], ...]
Sizes = tuple[Any, ...]

SAME_SHAPE = (
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.contiguous.default,
    aten._to_copy.default,
    prims.convert_element_type.default,
)
RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)


def equal(one: object, other: object) -> bool:
    """Tell whether two sizes are known to be equal."""
    return statically_known_true(one == other)


def first_labels(sizes: Sizes) -> Labels:
    """Return the labels of the weight's gradient itself."""
    return tuple(() if equal(size, 1) else (dim,) for dim, size in enumerate(sizes))


def labels_behind(node: fx.Node, labels: Labels, sizes: Sizes) -> Labels | None:
    """Return the labels of the input of a view, transpose or cast; None where dimensions mix.

    Args:
        sizes: of the weight's dimensions.
    """
    if node.target in TRANSPOSES:
        before: list[tuple[int, ...]] = [()] * len(labels)
        for out_dim, in_dim in enumerate(permutation(node)):
            before[in_dim] = labels[out_dim]
        return tuple(before)
    if node.target in RESHAPES:
        return _behind_reshape([dim for label in labels for dim in label], shape(node.all_input_nodes[0]), sizes)
    return labels


def _behind_reshape(dims: list[int], before: Sequence[Any], sizes: Sizes) -> Labels | None:
    """Deal the weight's dimensions, in order, to the dimensions of what was reshaped."""
    result = []
    for size in before:
        label: list[int] = []
        product: Any = 1
        while not equal(size, product):
            if not dims:
                return None
            label.append(dims.pop(0))
            product = product * sizes[label[-1]]
        result.append(tuple(label))
    return None if dims else tuple(result)


def permutation(node: fx.Node) -> Sequence[int]:
    """Return the input dimension behind each dimension of a transpose."""
    rank = len(shape(node))
    if node.target is aten.permute.default:
        return [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
    order = list(range(rank))
    if node.target is aten.t.default:
        return order[::-1]
    first, second = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return order
