"""Which weight and which activation a call of Dynamo's graph multiplies, and over which dimensions of the weight.

linear(x, w)             reads w [m,n] over (1,)        conv2d(x, w)        reads w [m,c,h,w] over (1, 2, 3)
x @ w                    reads w [n,m] over (0,)        grouped_mm(x, w)    reads w [e,n,m] over (1,)
einsum("bi,hdi->bhd")    reads w [h,d,i] over (2,)      multi_head_attention_forward reads four weights
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from oasis_fx.graph import shape, value


@dataclass(frozen=True)
class Matmul:
    """An activation times a weight. ``features`` are the dimensions of ``weight``, as called, that are summed over."""

    activation: Any
    weight: Any
    features: tuple[int, ...]


def matmuls(node: fx.Node) -> Iterator[Matmul]:
    """The matmuls that a call does; weights may be any node."""
    reader = _READERS.get(node.target) if node.op in ("call_function", "call_method") else None
    if reader is None and str(node.target) in _GROUPED_OF_OTHERS:
        reader = _grouped
    for found in reader(node) if reader is not None else ():
        if isinstance(found.activation, fx.Node) and isinstance(found.weight, fx.Node):
            yield found


def stored_weight(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """Follow transposes, casts and splits in parts back to where a weight is stored.

    Returns:
        That node, and for each dimension of ``node`` the dimension of the stored weight that it is.
    """
    steps: list[Callable[[tuple[int, ...]], tuple[int, ...]]] = []
    while node.op in ("call_method", "call_function") and node.args and isinstance(node.args[0], fx.Node):
        name, source = operation(node), node.args[0]
        if node.target is operator.getitem and isinstance(node.args[1], int) and operation(source) in _PARTS:
            source = source.args[0]  # type: ignore[assignment]  # a part of a weight has its dimensions
        elif name in _TRANSPOSES:
            permutation = _permutation(name, node, len(shape(node)))
            steps.append(lambda dims, p=permutation: tuple(dims[d] for d in p))  # type: ignore[misc]
        elif name not in _CASTS:
            break
        node = source
    dims = tuple(range(len(shape(node)))) if isinstance(value(node), torch.Tensor) else ()
    for step in reversed(steps):
        dims = step(dims)
    return node, dims


def behind_reshapes(node: fx.Node) -> fx.Node:
    """Follow reshapes that keep the last dimension, and casts: they name the same activation."""
    while node.op in ("call_method", "call_function") and operation(node) in _RESHAPES:
        source = node.args[0]
        if not isinstance(source, fx.Node) or shape(source)[-1:] != shape(node)[-1:]:
            break
        node = source
    return node


def operation(node: fx.Node) -> str:
    """The bare name of what a node calls, be it a method, a function, an attribute or an operator of aten."""
    if node.target is getattr:
        return {"T": "numpy_T"}.get(str(node.args[1]), str(node.args[1]))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).split(".")[0]


_CASTS = frozenset({"contiguous", "to", "type", "float", "half", "bfloat16", "double", "type_as"})
_RESHAPES = _CASTS | {"view", "reshape", "flatten"}
_TRANSPOSES = frozenset({"t", "transpose", "permute", "numpy_T", "mT"})
_PARTS = frozenset({"chunk", "split", "tensor_split"})


def _permutation(name: str, node: fx.Node, num_dims: int) -> list[int]:
    given = [int(dim) % num_dims for dim in torch.utils._pytree.tree_leaves(node.args[1:]) if isinstance(dim, int)]
    if name == "permute":
        return given
    order = list(range(num_dims))
    if name in ("t", "numpy_T"):
        return order[::-1]
    first, second = given if name == "transpose" else (num_dims - 2, num_dims - 1)
    order[first], order[second] = order[second], order[first]
    return order


def _linear(node: fx.Node) -> Iterator[Matmul]:
    given = _named(node, "input", "weight", "bias")
    if isinstance(given["weight"], fx.Node):
        yield Matmul(given["input"], given["weight"], (len(shape(given["weight"])) - 1,))


def _product(node: fx.Node, skip: int = 0) -> Iterator[Matmul]:
    names = ("mat1", "batch1", "other", "mat2", "batch2", "tensor2")
    operands: list[Any] = [*node.args[skip:], *(node.kwargs[name] for name in names if name in node.kwargs)]
    if len(operands) == 2 and all(isinstance(operand, fx.Node) for operand in operands):
        left, right = operands
        if _is_parameter(left):
            yield Matmul(right, left, (len(shape(left)) - 1,))
        else:
            yield Matmul(left, right, (len(shape(right)) - 2,))


def _grouped(node: fx.Node) -> Iterator[Matmul]:
    activation, weight = node.args[:2]
    if isinstance(weight, fx.Node):
        yield Matmul(activation, weight, (len(shape(weight)) - 2,))


def _convolution(node: fx.Node) -> Iterator[Matmul]:
    given = _named(node, "input", "weight", "bias", "stride", "padding", "dilation", "groups")
    if given.get("groups", 1) == 1 and isinstance(given["weight"], fx.Node):
        yield Matmul(given["input"], given["weight"], tuple(range(1, len(shape(given["weight"])))))


def _einsum(node: fx.Node) -> Iterator[Matmul]:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return
    terms, result = equation.replace(" ", "").split("->")
    for weight, activation in ((1, 0), (0, 1)):
        subscripts, operand = terms.split(",")[weight], operands[weight]
        if isinstance(operand, fx.Node) and _is_parameter(operand) and len(subscripts) == len(shape(operand)):
            summed = tuple(dim for dim, letter in enumerate(subscripts) if letter not in result)
            if summed:
                yield Matmul(operands[activation], operand, summed)
            return


def _attention(node: fx.Node) -> Iterator[Matmul]:
    given = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs).arguments
    for name, weight in (("query", "q_proj_weight"), ("key", "k_proj_weight"), ("value", "v_proj_weight")):
        packed = given.get(weight) is None
        yield Matmul(given[name], given["in_proj_weight"] if packed else given[weight], (1,))
    yield Matmul(node, given["out_proj_weight"], (1,))  # what it reads has no node: the call stands for it


def _named(node: fx.Node, *names: str) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(value(stored_weight(node)[0]), torch.nn.Parameter)


_READERS: dict[Any, Callable[[fx.Node], Iterator[Matmul]]] = {
    F.linear: _linear,
    torch._C._nn.linear: _linear,
    torch.einsum: _einsum,
    F.multi_head_attention_forward: _attention,
    **{call: _convolution for call in (torch.conv1d, torch.conv2d, torch.conv3d)},
    **{call: _product for call in (torch.mm, torch.matmul, torch.bmm, operator.matmul)},
    **{call: _product for call in ("mm", "matmul", "bmm", "__matmul__")},
    **{call: lambda node: _product(node, skip=1) for call in (torch.addmm, torch.baddbmm, "addmm", "baddbmm")},
    torch._grouped_mm: _grouped,
    F.grouped_mm: _grouped,
}
# What transformers calls for experts where torch's grouped matmul does not compile.
_GROUPED_OF_OTHERS = ("transformers.grouped_mm_fallback", "transformers.grouped_mm_fallback.default")
