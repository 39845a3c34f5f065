"""Read a call that multiplies a weight and an activation from the matmuls that torch makes of it.

    tensordot(x, w, ([2], [1]))      view, permute, mm      reads w [m,n] over (1,)
    inner(x, w)                      view, permute, mm      reads w [m,n] over (1,)

A call that cannot be run by itself on fake values (a higher-order operator, one that waits for data) is not read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from oasis_fx._torch.fake_tensors import unguarded_fake_mode
from oasis_fx.graph.edits import aten, value
from oasis_fx.passes.matchers.follow_weights import behind_reshapes, stored_weight
from oasis_fx.passes.matchers.read_matmuls import Matmul

# Operators of two matrices (or stacks of them), by the position of the first.
_PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}


def decomposed_matmuls(node: fx.Node, weights: Collection[fx.Node]) -> list[Matmul]:
    """Find the matmuls with one of ``weights`` (placeholders) within a call that reads an activation, too."""
    inputs = [source for source in node.all_input_nodes if isinstance(value(source), torch.Tensor)]
    read = [stored_weight(source)[0] in weights for source in inputs]
    if not any(read) or all(read) or not isinstance(value(node), torch.Tensor) or len(inputs) < len(_inputs(node)):
        return []
    traced = _decompose(node, inputs)
    if traced is None:
        return []
    outer = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    found = []
    for operator, left, right in _operands(traced.graph):
        for operand, other, dim in ((left, right, -1), (right, left, -2)):
            stored, labels = stored_weight(operand)
            if stored in outer and stored_weight(outer[stored])[0] in weights:
                at = 1 if operator is aten.convolution.default else len(labels) + dim
                summed = labels[at:] if operator is aten.convolution.default else labels[at : at + 1]
                features = tuple(sorted(d for label in summed for d in label))
                activation = outer.get(
                    behind_reshapes(other), node
                )  # without a node of its own, the call stands for it
                if features:
                    found.append(Matmul(activation, outer[stored], features))
    return found


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if not isinstance(value(source), torch.SymInt | torch.SymFloat)]


def _operands(graph: fx.Graph) -> Iterator[tuple[Any, fx.Node, fx.Node]]:
    for node in graph.nodes:
        if node.target in _PRODUCTS:
            left, right = node.args[_PRODUCTS[node.target] :][:2]
            yield node.target, left, right
        elif node.target is aten.convolution.default and not node.args[6] and node.args[8] == 1:
            yield node.target, node.args[1], node.args[0]  # the weight is the first operand here


def _decompose(node: fx.Node, inputs: list[fx.Node]) -> fx.GraphModule | None:
    def run(*given: torch.Tensor) -> Any:
        known = dict(zip(inputs, given, strict=True))
        arguments: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n] if n in known else value(n))
        args, kwargs = arguments
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    values = [value(source) for source in inputs]
    try:
        with unguarded_fake_mode(values), torch.no_grad():
            return make_fx(run)(*(given.detach() for given in values))
    except Exception:  # whatever a call of the user's may raise outside of its graph
        return None
