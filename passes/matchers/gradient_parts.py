"""Take apart a gradient that is put together of the gradients of parts of a weight.

cat([mm, zeros])                       w.chunk(2)[0]        two blocks of rows, the second of zeros
slice_backward(mm, [4,6], 0, 2, 4)     w[2:]                two blocks, the first of zeros
select_backward(mm, [8,4,6], 0, 3)     experts[3]           three blocks
stack([mm, mm])                        w.unbind()           a block for each row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from oasis_fx.graph.edits import aten, shape
from oasis_fx.passes.matchers.dimension_labels import Labels, Sizes, equal

_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_FULL = (aten.full.default, aten.full_like.default, aten.new_full.default)
_SLICES = (aten.slice_backward.default, aten.slice_scatter.default)
_SELECTS = (aten.select_backward.default, aten.select_scatter.default)


@dataclass(frozen=True)
class Part:
    """Some rows of a gradient: how many of the slowest dimension, and what their gradient is, or None for zeros."""

    count: Any
    node: fx.Node | None = None
    labels: Labels = ()


def is_zero(node: fx.Node) -> bool:
    """Tell whether a node is made of zeros."""
    if node.target is aten.expand.default:
        return is_zero(node.args[0])  # type: ignore[arg-type]
    return node.target in _ZEROS or (node.target in _FULL and bool(node.args[1] == 0))


def gradient_parts(node: fx.Node, labels: Labels, rows: Sequence[int], sizes: Sizes) -> list[Part] | None:
    """Return the parts that ``node`` puts together, from the first row to the last.

    Args:
        labels: of ``node``.
        rows: the dimensions of the weight that are rows.
        sizes: of the weight's dimensions.

    Returns:
        None where ``node`` puts nothing together, no parts where it does along something else than whole slowest rows.
    """
    if node.target is aten.cat.default:
        dim = _dim(node, 1, len(labels))
        return _along(dim, [(part, shape(part)[dim]) for part in node.args[0]], labels, rows, sizes)  # type: ignore
    if node.target is aten.stack.default:
        dim = _dim(node, 1, len(labels))
        if labels[dim] != tuple(rows[:1]):
            return []
        return [Part(1, part, (*labels[:dim], *labels[dim + 1 :])) for part in node.args[0]]  # type: ignore
    if node.target not in (*_SLICES, *_SELECTS):
        return None
    at = 0 if node.target in (aten.slice_backward.default, aten.select_backward.default) else 1
    if at == 1 and not is_zero(node.args[0]):  # type: ignore[arg-type]
        return None  # something else lies around the part
    part, dim = node.args[at], _dim(node, 2, len(labels))
    total = shape(node)[dim]
    if node.target in _SELECTS:
        if labels[dim] != tuple(rows[:1]):
            return []
        start = int(node.args[3]) % total  # type: ignore[arg-type]
        around = Part(start), Part(1, part, (*labels[:dim], *labels[dim + 1 :])), Part(total - start - 1)  # type: ignore
        return [one for one in around if not equal(one.count, 0)]
    bounds: list[Any] = [*node.args[3:], *(None, None, 1)[len(node.args) - 3 :]]
    if bounds[2] != 1:
        return []
    start, _, _ = slice(bounds[0], bounds[1]).indices(total)
    length = shape(part)[dim]  # type: ignore[arg-type]
    pieces = [(None, start), (part, length), (None, total - start - length)]
    return _along(dim, [piece for piece in pieces if not equal(piece[1], 0)], labels, rows, sizes)  # type: ignore


def _dim(node: fx.Node, position: int, num_dims: int) -> int:
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return int(given) % num_dims  # type: ignore[arg-type]


def _along(
    dim: int, pieces: Sequence[tuple[fx.Node | None, Any]], labels: Labels, rows: Sequence[int], sizes: Sizes
) -> list[Part]:
    """Pieces side by side along a dimension that runs over the slowest rows, and perhaps over the next ones too."""
    label = labels[dim]
    if not label or label != tuple(rows[: len(label)]):
        return []
    inner: Any = 1
    for row in label[1:]:
        inner = inner * sizes[row]
    parts = []
    for node, length in pieces:
        if not equal(length % inner, 0):
            return []
        count = length // inner
        kept = label[1:] if equal(count, 1) else label
        parts.append(Part(count, node, tuple(kept if at == dim else given for at, given in enumerate(labels))))
    return parts
