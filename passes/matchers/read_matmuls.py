"""Which weight and which activation a call of Dynamo's graph multiplies, and over which dimensions of the weight.

linear(x, w)             reads w [m,n] over (1,)        conv2d(x, w)        reads w [m,c,h,w] over (1, 2, 3)
x @ w                    reads w [n,m] over (0,)        grouped_mm(x, w)    reads w [e,n,m] over (1,)
einsum("bi,hdi->bhd")    reads w [h,d,i] over (2,)      multi_head_attention_forward reads four weights

What is met often is read by its arguments. Any other call of a weight and an activation is read by what torch makes of
it (`oasis_fx.passes.matchers.read_decomposed`), however it is spelled.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from oasis_fx.graph.edits import shape
from oasis_fx.passes.matchers.follow_weights import stored_weight


@dataclass(frozen=True)
class Matmul:
    """An activation times a weight. ``features`` are the dimensions of ``weight``, as called, that are summed over."""

    activation: Any
    weight: Any
    features: tuple[int, ...]


def matmuls(node: fx.Node, weights: Collection[fx.Node]) -> list[Matmul]:
    """Find the matmuls of a call that read one of ``weights`` (placeholders), also behind transposes, casts, parts."""
    if node.op not in ("call_function", "call_method"):
        return []
    reader = _READERS.get(getattr(node.target, "overloadpacket", node.target))
    if reader is None and str(node.target) in _GROUPED_OF_OTHERS:
        reader = _grouped
    found = [] if reader is None else list(reader(node, weights))
    return [
        one
        for one in found
        if isinstance(one.activation, fx.Node)
        and isinstance(one.weight, fx.Node)
        and stored_weight(one.weight)[0] in weights
    ]


def _linear(node: fx.Node, _: Collection[fx.Node]) -> Iterator[Matmul]:
    given = _named(node, "input", "weight", "bias")
    if isinstance(given.get("weight"), fx.Node):
        yield Matmul(given.get("input"), given["weight"], (len(shape(given["weight"])) - 1,))


def _product(*names: str) -> Callable[[fx.Node, Collection[fx.Node]], Iterator[Matmul]]:
    """A reader of products of two operands, the last two of ``names``."""

    def read(node: fx.Node, weights: Collection[fx.Node]) -> Iterator[Matmul]:
        given = _named(node, *names)
        left, right = (given.get(name) for name in names[-2:])
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return
        if stored_weight(left)[0] in weights and len(shape(left)) > 1:
            yield Matmul(right, left, (len(shape(left)) - 1,))
        if stored_weight(right)[0] in weights and len(shape(right)) > 1:
            yield Matmul(left, right, (len(shape(right)) - 2,))

    return read


def _grouped(node: fx.Node, _: Collection[fx.Node]) -> Iterator[Matmul]:
    given = _named(node, "input", "mat2")
    activation, weight = given.get("input", given.get("mat_a")), given.get("mat2", given.get("mat_b"))
    if isinstance(weight, fx.Node):
        yield Matmul(activation, weight, (len(shape(weight)) - 2,))


def _convolution(node: fx.Node, _: Collection[fx.Node]) -> Iterator[Matmul]:
    given = _named(node, "input", "weight", "bias", "stride", "padding", "dilation", "groups")
    if given.get("groups", 1) == 1 and isinstance(given.get("weight"), fx.Node):
        yield Matmul(given.get("input"), given["weight"], tuple(range(1, len(shape(given["weight"])))))


def _einsum(node: fx.Node, weights: Collection[fx.Node]) -> Iterator[Matmul]:
    if not node.args:
        return
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return
    terms, result = equation.replace(" ", "").split("->")
    for weight, activation in ((1, 0), (0, 1)):
        subscripts, operand = terms.split(",")[weight], operands[weight]
        if not isinstance(operand, fx.Node) or stored_weight(operand)[0] not in weights:
            continue
        if len(subscripts) == len(shape(operand)):
            summed = tuple(dim for dim, letter in enumerate(subscripts) if letter not in result)
            if summed:
                yield Matmul(operands[activation], operand, summed)
            return


def _attention(node: fx.Node, _: Collection[fx.Node]) -> Iterator[Matmul]:
    given = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs).arguments
    for name, weight in (("query", "q_proj_weight"), ("key", "k_proj_weight"), ("value", "v_proj_weight")):
        packed = given.get(weight) is None
        yield Matmul(given[name], given["in_proj_weight"] if packed else given[weight], (1,))
    yield Matmul(node, given["out_proj_weight"], (1,))  # what it reads has no node: the call stands for it


def _named(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments of a call by name, the positional ones under ``names``; the operators' ``self`` is ``input``."""
    by_name = {"input" if name == "self" else name: given for name, given in node.kwargs.items()}
    return dict(zip(names, node.args, strict=False)) | by_name


_aten = torch.ops.aten
_READERS: dict[Any, Callable[[fx.Node, Collection[fx.Node]], Iterator[Matmul]]] = {
    **{call: _linear for call in (F.linear, torch._C._nn.linear, _aten.linear)},
    torch.einsum: _einsum,
    F.multi_head_attention_forward: _attention,
    **{
        call: _convolution
        for call in (torch.conv1d, torch.conv2d, torch.conv3d, _aten.conv1d, _aten.conv2d, _aten.conv3d)
    },
    **{call: _product("input", "mat2") for call in (torch.mm, torch.bmm, _aten.mm, _aten.bmm, "mm", "bmm")},
    **{
        call: _product("input", "other")
        for call in (torch.matmul, torch.linalg.matmul, _aten.matmul, operator.matmul, "matmul", "__matmul__")
    },
    **{call: _product("input", "mat1", "mat2") for call in (torch.addmm, _aten.addmm, "addmm")},
    **{call: _product("input", "batch1", "batch2") for call in (torch.baddbmm, _aten.baddbmm, "baddbmm")},
    **{call: _grouped for call in (torch._grouped_mm, F.grouped_mm, _aten._grouped_mm)},
}
# What transformers calls for experts where torch's grouped matmul does not compile.
_GROUPED_OF_OTHERS = ("transformers.grouped_mm_fallback", "transformers.grouped_mm_fallback.default")
