"""Verify a graph after a pass: each operator is run once more, on fake values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from oasis_fx.graph.edits import run_on_values, value


class PassError(Exception):
    """A pass met a graph that breaks what it requires, or left one that breaks what it ensures."""

    def __init__(self, pass_name: str, node: fx.Node | None, why: str) -> None:
        at = "" if node is None else f" at {node.format_node()}"
        super().__init__(f"{pass_name}{at}: {why}")


def check_graph(pass_name: str, graph: fx.Graph, nodes: Iterable[fx.Node] | None = None) -> None:
    """Verify a graph, or some nodes of it, after a pass.

    Each operator is run once more, on its inputs' fake values; shape, dtype and device must be those that
    the node claims. Operators without a schema (higher-order ones) are taken at their word.

    Raises:
        PassError: naming the pass and the node, with what it claims and what was found.
    """
    try:
        graph.lint()
    except RuntimeError as error:
        raise PassError(pass_name, None, str(error).splitlines()[0]) from error  # the rest is the whole graph
    for node in graph.nodes if nodes is None else nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            _check_node(pass_name, node)


def _check_node(pass_name: str, node: fx.Node) -> None:
    if any(value(source) is None for source in node.all_input_nodes):
        raise PassError(pass_name, node, "an input has no value")
    found, claimed = run_on_values(node), value(node)
    flat_found, flat_claimed = (torch.utils._pytree.tree_leaves(item) for item in (found, claimed))
    for one, other in zip(flat_found, flat_claimed, strict=True):
        if not isinstance(one, torch.Tensor):
            continue
        same_shape = one.dim() == other.dim() and all(
            statically_known_true(a == b) for a, b in zip(one.shape, other.shape, strict=True)
        )
        if not same_shape or one.dtype != other.dtype or one.device != other.device:
            raise PassError(pass_name, node, f"claims {_describe(other)}, computes {_describe(one)}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)} on {tensor.device}"
