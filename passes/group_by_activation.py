"""Find, on Dynamo's graph, the weights that a matmul reads, and which of them read one activation.

    q = linear(x, wq)                        {wq, wk, wv}   read x   -> one basis
    k = linear(x.view(-1, n), wk)     -->
    v = x @ wv                               {wo}           reads a  -> one basis
    y = linear(a, wo)

This decides what the runtime lends to a graph, on every compile, warm or cold. It need not be exact: whether
a weight's gradient is rewritten is decided on the joint graph, by what its nodes compute.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from oasis_fx.graph import shape, value


@dataclass(frozen=True)
class WeightUse:
    """A parameter that matmuls of the graph read.

    Attributes:
        weight: its placeholder.
        transposed: stored n x m, not m x n.
        activations: the nodes that its matmuls read, behind reshapes.
    """

    weight: fx.Node
    transposed: bool
    activations: tuple[fx.Node, ...]


def group_by_activation(
    gm: fx.GraphModule, weights: Sequence[fx.Node]
) -> tuple[tuple[tuple[WeightUse, ...], ...], Mapping[fx.Node, str]]:
    """Return groups of weights that share an activation, and the reason for each weight left out.

    Args:
        gm: the graph of Dynamo; not changed.
        weights: placeholders of the trainable parameters to look at.
    """
    uses: dict[fx.Node, list[tuple[bool, fx.Node]]] = {}
    for activation, weight, transposed in _matmuls(gm, {}):
        uses.setdefault(weight, []).append((transposed, activation))
    found: list[WeightUse] = []
    reasons: dict[fx.Node, str] = {}
    for weight in weights:
        orientations = {transposed for transposed, _ in uses.get(weight, ())}
        if len(shape(weight)) != 2:
            reasons[weight] = f"it has {len(shape(weight))} dimensions, not 2"
        elif not orientations:
            reasons[weight] = "no matmul of this graph reads it directly"
        elif len(orientations) == 2:
            reasons[weight] = "matmuls read it both as stored and transposed"
        else:
            activations = tuple(dict.fromkeys(activation for _, activation in uses[weight]))
            found.append(WeightUse(weight, orientations.pop(), activations))
    return _connected(found), reasons


def _connected(uses: Sequence[WeightUse]) -> tuple[tuple[WeightUse, ...], ...]:
    """Merge uses that share an activation, directly or through others; keep the graph's order."""
    groups: list[tuple[set[fx.Node], list[WeightUse]]] = []
    for use in uses:
        joined = [group for group in groups if group[0] & set(use.activations)]
        groups = [group for group in groups if group not in joined]
        activations = set(use.activations).union(*(nodes for nodes, _ in joined))
        groups.append((activations, [member for _, members in joined for member in members] + [use]))
    order = {use.weight: index for index, use in enumerate(uses)}
    members = [sorted(group, key=lambda use: order[use.weight]) for _, group in groups]
    return tuple(tuple(group) for group in sorted(members, key=lambda group: order[group[0].weight]))


def _matmuls(gm: fx.GraphModule, outer: Mapping[fx.Node, fx.Node]) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """Yield (activation, weight placeholder, transposed) for each matmul with a stored weight.

    ``outer`` maps the placeholders of a checkpointed region's body to the nodes that are passed to it.
    """
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.higher_order.tag_activation_checkpoint:
            body = getattr(gm, node.args[0].target)
            arguments = [outer.get(a, a) for a in node.args[1:]]
            yield from _matmuls(body, dict(zip(body.graph.find_nodes(op="placeholder"), arguments, strict=False)))
            continue
        operands = _operands(node)
        if operands is None:
            continue
        activation, weight, transposed = operands
        if not isinstance(activation, fx.Node) or not isinstance(weight, fx.Node):
            continue
        stored, flipped = _stored_weight(weight)
        if stored in outer:  # its transpose may have been taken outside the region
            stored, flipped_outside = _stored_weight(outer[stored])
            flipped = flipped != flipped_outside
        if stored.op == "placeholder" and len(shape(stored)) == 2:
            source = _behind_reshapes(activation)
            yield _behind_reshapes(outer.get(source, source)), stored, transposed != flipped


def _operands(node: fx.Node) -> tuple[Any, Any, bool] | None:
    """(activation, weight, weight is n x m) of a matmul call, or None."""
    reader = _READERS.get(node.target) if node.op in ("call_function", "call_method") else None
    return None if reader is None else reader(node)


def _linear(node: fx.Node) -> tuple[Any, Any, bool]:
    arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return arguments["input"], arguments["weight"], False


def _product(node: fx.Node, skip: int = 0) -> tuple[Any, Any, bool] | None:
    operands = [
        *node.args[skip:],
        *(node.kwargs[k] for k in ("mat1", "other", "mat2", "tensor2") if k in node.kwargs),
    ]
    if len(operands) != 2:
        return None
    left, right = operands
    if isinstance(left, fx.Node) and _stored_weight(left)[0].op == "placeholder" and _is_parameter(left):
        return right, left, False  # W @ x
    return left, right, True  # x @ W


def _einsum(node: fx.Node) -> tuple[Any, Any, bool] | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    terms, result = equation.replace(" ", "").split("->")
    for weight, activation in ((1, 0), (0, 1)):
        subscripts = terms.split(",")[weight]
        operand = operands[weight]
        if len(subscripts) != 2 or not isinstance(operand, fx.Node) or not _is_parameter(operand):
            continue
        contracted = [letter not in result for letter in subscripts]
        if contracted.count(True) == 1:
            return operands[activation], operands[weight], contracted[0]
    return None


_READERS: dict[Any, Callable[[fx.Node], tuple[Any, Any, bool] | None]] = {
    F.linear: _linear,
    torch._C._nn.linear: _linear,
    torch.einsum: _einsum,
    **{call: _product for call in (torch.mm, torch.matmul, operator.matmul, "mm", "matmul", "__matmul__")},
    **{call: lambda node: _product(node, skip=1) for call in (torch.addmm, "addmm")},
}


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(value(_stored_weight(node)[0]), torch.nn.Parameter)


_CASTS = frozenset({"contiguous", "to", "float", "half", "bfloat16", "double", "type_as"})
_RESHAPES = _CASTS | {"view", "reshape", "flatten"}
_TRANSPOSES = frozenset({"t", "transpose", "permute", "numpy_T", "mT"})


def _stored_weight(node: fx.Node) -> tuple[fx.Node, bool]:
    """Follow transposes and casts of a matrix to where it is stored; True if it is seen transposed."""
    flipped = False
    while node.op in ("call_method", "call_function") and node.args and isinstance(node.args[0], fx.Node):
        name = _operation(node)
        if name in _TRANSPOSES:
            dims = torch.utils._pytree.tree_leaves(node.args[1:])
            flipped = flipped != (name != "permute" or [dim % 2 for dim in dims] == [1, 0])
        elif name not in _CASTS:
            break
        node = node.args[0]
    return node, flipped


def _behind_reshapes(node: fx.Node) -> fx.Node:
    """Follow reshapes that keep the last dimension, and casts: they name the same activation."""
    while node.op in ("call_method", "call_function") and _operation(node) in _RESHAPES:
        source = node.args[0]
        if not isinstance(source, fx.Node) or shape(source)[-1:] != shape(node)[-1:]:
            break
        node = source
    return node


def _operation(node: fx.Node) -> str:
    """The bare name of what a node calls, be it a method, a function, an attribute or an operator of aten."""
    if node.target is getattr:
        return {"T": "numpy_T"}.get(str(node.args[1]), str(node.args[1]))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).split(".")[0]
