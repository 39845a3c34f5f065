"""Follow a node of a forward graph back to the weight or the activation that it is, behind views, casts and parts.

    w.t(), w.mT, w.permute(1, 0), torch.transpose(input=w, dim0=0, dim1=1)      the weight, its dimensions swapped
    w.chunk(2)[0], w[:2], w.narrow(0, 0, 2)                                    the weight, or a part of it
    w.view(4, 6) of [2,2,6]                                                    the weight, two dimensions merged

Views are read from the strides of the fake values, and not by the names of what makes them, which are many.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from oasis_fx._torch.tensors import shares_memory
from oasis_fx.graph.edits import shape, value
from oasis_fx.passes.matchers.dimension_labels import Labels, equal

CASTS = frozenset(
    {
        *("contiguous", "clone", "to", "type", "type_as", "float", "half", "bfloat16", "double"),
        *("_to_copy", "convert_element_type"),
    }
)
RESHAPES = CASTS | {"view", "_unsafe_view", "reshape", "flatten"}


def stored_weight(node: fx.Node) -> tuple[fx.Node, Labels]:
    """Follow views, casts and parts back to where a weight is stored.

    Returns:
        That node, and for each dimension of ``node`` the dimensions of the stored weight that it runs over.
    """
    labels: Labels | None = None
    while (step := _step_back(node)) is not None:
        node, behind = step
        labels = behind if labels is None else tuple(tuple(d for dim in label for d in behind[dim]) for label in labels)
    if labels is None:
        given = value(node)
        labels = tuple((dim,) for dim in range(given.dim())) if isinstance(given, torch.Tensor) else ()
    return node, labels


def behind_reshapes(node: fx.Node) -> fx.Node:
    """Follow reshapes that keep the last dimension, and casts: they name the same activation."""
    while node.op in ("call_method", "call_function") and operation(node) in RESHAPES:
        source = source_of(node)
        if source is None or not isinstance(value(source), torch.Tensor) or shape(source)[-1:] != shape(node)[-1:]:
            break
        node = source
    return node


def operation(node: fx.Node) -> str:
    """Return the bare name of what a node calls, be it a method, a function, an attribute or an operator of aten."""
    if node.target is getattr:
        return str(node.args[1])
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).split(".")[0]


def source_of(node: fx.Node) -> fx.Node | None:
    """Return the tensor that a view or cast is of: its first argument, under whatever name."""
    if node.op not in ("call_method", "call_function"):
        return None
    named = [node.kwargs[name] for name in ("input", "self", "tensor", "a") if name in node.kwargs]
    first = node.args[0] if node.args else next(iter(named), None)
    return first if isinstance(first, fx.Node) else None


def _step_back(node: fx.Node) -> tuple[fx.Node, Labels] | None:
    """What ``node`` is a view, a cast or a part of, with the dimensions that its own run over."""
    source, made = source_of(node), value(node)
    if source is None or not isinstance(made, torch.Tensor):
        return None
    if node.target is operator.getitem and isinstance(value(source), tuple | list):
        source = source_of(source)  # a part of a tensor: chunk, split, unbind
        if source is None:
            return None
    given = value(source)
    if not isinstance(given, torch.Tensor) or given.requires_grad != made.requires_grad:  # detached: no gradient here
        return None
    if made.dtype == given.dtype and shares_memory(made, given):
        labels = view_labels(given, made)
        return None if labels is None else (source, labels)
    if operation(node) in CASTS and made.shape == given.shape:
        return source, tuple((dim,) for dim in range(made.dim()))
    return None


def view_labels(source: torch.Tensor, view: torch.Tensor) -> Labels | None:
    """Return for each dimension of a view the dimensions of ``source`` that it runs over, slowest first.

    A dimension may run over a part of one of the source's. None where one runs over a fraction of several, as where a
    dimension was split.
    """
    sizes, strides = source.shape, source.stride()
    free = [dim for dim in range(source.dim()) if not equal(sizes[dim], 1)]
    found: list[tuple[int, ...] | None] = [None] * view.dim()
    for at, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if equal(size, 1):
            continue
        label = _dimensions_of(size, stride, sizes, strides, free)
        if label is None:
            return None
        free = [dim for dim in free if dim not in label]
        found[at] = label
    # Dimensions of size 1 say nothing by their strides.
    ones = [dim for dim in range(source.dim()) if equal(sizes[dim], 1)]
    unknown = [at for at, label in enumerate(found) if label is None]
    if len(ones) == len(unknown):
        found = [(ones.pop(0),) if label is None else label for label in found]
    for at in unknown:
        if found[at] is None:  # one of many rows
            label = tuple(dim for dim in free if equal(strides[dim], view.stride(at)))[:1]
            free = [dim for dim in free if dim not in label]
            found[at] = label
    return tuple(label or () for label in found)


def _dimensions_of(
    size: Any, stride: Any, sizes: Sequence[Any], strides: Sequence[Any], free: Sequence[int]
) -> tuple[int, ...] | None:
    label: tuple[int, ...] = ()
    covered: Any = 1
    while not label or _more(size, covered):
        next_stride = stride if not label else strides[label[0]] * sizes[label[0]]
        slower = [dim for dim in free if dim not in label and equal(strides[dim], next_stride)]
        if not slower:
            return None
        label = (slower[0], *label)
        covered = covered * sizes[slower[0]]
    return label if len(label) == 1 or equal(size, covered) else None


def _more(size: Any, covered: Any) -> bool:
    """Whether a dimension is known to be larger than what was found for it."""
    return not equal(size, covered) and bool(statically_known_true(size > covered))
