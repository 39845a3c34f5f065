"""Words for the tensors of a graph: whose gradient one is, or what computes it in which module."""

from __future__ import annotations

import re

import torch
from torch import fx

from oasis_fx._torch.joint_graphs import gradient_positions
from oasis_fx.graph.edits import outputs, value
from oasis_fx.inspect.nodes import module_path
from oasis_fx.inspect.printing import operator_name
from oasis_fx.plan.trace import FakeModel, Halves


def block_of(node: fx.Node) -> int | None:
    """Return the number of the block that a node is from; None of what is around the blocks."""
    found = re.search(r"\.(\d+)\.", f".{module_path(node)}.")
    return int(found[1]) if found else None


class Words:
    """Words for the tensors of the forward and the backward graph of a model.

    Args:
        traced: the model whose graphs these are.
        graphs: forward and backward.
        rewritten: whether they are as this backend rewrites them.
        vocabulary: the last size of logits.
    """

    def __init__(self, traced: FakeModel, graphs: Halves, *, rewritten: bool, vocabulary: int) -> None:
        trace, names = traced.trace, dict(traced.record.names)
        if rewritten and traced.record.layout is not None:
            names |= traced.record.layout.names()
        joint = (trace.after if rewritten else trace.before).graph
        self._vocabulary = vocabulary
        self._nodes = {node.name: node for graph in reversed(graphs) for node in graph.nodes}  # forward's win
        self._gradient_of: dict[fx.Node, str] = {}
        returned = outputs(graphs[1])
        for position, output in gradient_positions(joint).items():
            at = output - trace.num_forward_outputs
            node = returned[at] if 0 <= at < len(returned) else None
            if isinstance(node, fx.Node) and position in names:
                self._gradient_of[node] = names[position]

    def of(self, name: str) -> str:
        """Return words for the tensor that a node of this name owns: ``float32 gradient of embed_tokens.weight``."""
        node = self._nodes[name]
        found = value(node)
        dtype = str(found.dtype).removeprefix("torch.") if isinstance(found, torch.Tensor) else ""
        weight = self._weight_behind(node)
        if weight is not None:
            return f"{dtype} gradient of {weight}"
        what = operator_name(node) if node.op == "call_function" else name
        if isinstance(found, torch.Tensor) and found.dim() > 1 and found.shape[-1] == self._vocabulary:
            what = "logits"
        module = module_path(node)
        return f"{dtype} {what}{f' of {module}' if module else ''}".strip()

    def _weight_behind(self, node: fx.Node) -> str | None:
        """The weight whose gradient a node becomes, by way of casts, sums and views of the same number of elements."""
        size = value(node)
        while isinstance(size, torch.Tensor):
            if node in self._gradient_of:
                return self._gradient_of[node]
            users = [user for user in node.users if user.op != "output" and _like(value(user), size)]
            if len(users) != 1:
                return None
            (node,) = users
        return None


def _like(found: object, size: torch.Tensor) -> bool:
    return isinstance(found, torch.Tensor) and found.shape == size.shape
