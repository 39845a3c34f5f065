"""What the passes share: facts about a joint graph, node helpers, and the graph verifier.

Symbols, here and in passes/: N tokens, n in_features, m out_features, r rank;
X[N,n] activation, W[m,n] weight, Q[n,r] basis, S[m,r] coordinate slot;
P[N,r] = X Q, G[m,r] = dY^T P, C[n,r] = X^T P.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from oasis_fx.torch_private import unguarded_fake_mode

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class LiftedWeight:
    """One candidate weight and the runtime's inputs for it, by position among the graph's inputs.

    Numbers only: they are part of the compile cache's key, and equal layers must give equal keys.

    Attributes:
        weight: position of W.
        slot: position of S, whose gradient will be G.
        basis: position of Q, whose gradient will be C; weights that read one activation share it.
        energy: position of a scalar beside Q, whose gradient will be ||X||^2; None where that is not wanted.
        features: dimensions of W, from and to, that its matmul sums over: (1, 2) of nn.Linear's [m,n], (0, 1) of
            Conv1D's [n,m], (1, 4) of a convolution's [m,c,h,w], (1, 2) of experts' [e,n,m]. The others are rows.
        of_gradient: project dW, and not X.
        statistic: whether the basis goes by C, or else by nothing that the graph computes for it.
        control: position of what the operators of `oasis_fx.runtime.in_graph` are told, where the basis goes by the
            batch itself; Q is then a stand-in of its shape. None elsewhere.
        dense: whether the gradient leaves the graph as G Q^T, in the weight's own slot.
    """

    weight: int
    slot: int
    basis: int
    energy: int | None
    features: tuple[int, int]
    of_gradient: bool = False
    statistic: bool = True
    control: int | None = None
    dense: bool = False

    def rows(self, num_dims: int) -> tuple[int, ...]:
        """The dimensions of W that are rows of S, in order."""
        return *range(self.features[0]), *range(self.features[1], num_dims)


class Kind(Enum):
    """How a weight gradient is computed from dY and X."""

    MATMUL = "matmul"  # dY [N,m], X [N,n]; or [1,N,..]
    BATCHED = "batched matmul"  # dY [e,N,m], X [e,N,n], one matmul an expert
    GROUPED = "grouped matmul"  # dY [N,m], X [N,n], rows of one expert behind those of another
    CONVOLUTION = "convolution"  # dY [b,m,*], X [b,c,*]


@dataclass(frozen=True)
class Contraction:
    """One matmul ``dY^T X`` within a weight gradient.

    Attributes:
        kind: which operator does it.
        dense: the node that computes it.
        dy: the operand that depends on an incoming gradient; its last two dimensions are swapped if ``dy_transposed``.
        x: the operand that does not; swapped if ``x_transposed``.
    """

    kind: Kind
    dense: fx.Node
    dy: fx.Node
    dy_transposed: bool
    x: fx.Node
    x_transposed: bool


@dataclass(frozen=True)
class WeightGradient:
    """A weight gradient made of contractions.

    Attributes:
        inputs: the weight and the runtime's inputs for it.
        position: where its dense gradient stands among the joint graph's outputs.
        blocks: its blocks of rows, from first to last: one, or one for each part of a weight used in parts. Each is
            the sum of its contractions: one for each use of the weight, none for a part that is not used.
        rows: how many rows of G each block has.
    """

    inputs: LiftedWeight
    position: int
    blocks: tuple[tuple[Contraction, ...], ...]
    rows: tuple[Any, ...]

    @property
    def terms(self) -> tuple[Contraction, ...]:
        return tuple(term for block in self.blocks for term in block)


@dataclass(frozen=True)
class Skipped:
    """A weight (position among the graph's inputs) that keeps its dense gradient, and why."""

    weight: int
    reason: str


class PassError(Exception):
    """A pass met a graph that breaks what it requires, or left one that breaks what it ensures."""

    def __init__(self, pass_name: str, node: fx.Node | None, why: str) -> None:
        at = "" if node is None else f" at {node.format_node()}"
        super().__init__(f"{pass_name}{at}: {why}")


def value(node: fx.Node) -> Any:
    """The fake value of a node: AOTAutograd's ``val``, or Dynamo's ``example_value``."""
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a tensor node; sizes are ints or SymInts."""
    return tuple(value(node).shape)


def outputs(graph: fx.Graph) -> list[Any]:
    """The output values of a graph (nodes, numbers or None) as a flat list."""
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def set_output(graph: fx.Graph, position: int, node: fx.Node | None) -> None:
    """Put ``node`` at ``position`` of the graph's outputs."""
    output = graph.output_node()
    values = outputs(graph)
    values[position] = node
    output.args = (tuple(values),)


def dependents(sources: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that are computed from ``sources``, these included."""
    found = set(sources)
    pending = list(found)
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that ``nodes`` are computed from, these included."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def insert_after(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert ``target(*args, **kwargs)`` behind ``node``, or behind the inputs where ``node`` is one of them."""
    arguments, sizes = _with_sizes_as_nodes(graph, args, kwargs)
    point = list(graph.find_nodes(op="placeholder"))[-1] if node.op == "placeholder" else node
    with graph.inserting_after(max(point, *sizes) if sizes else point):
        return _finish(graph.call_function(target, *arguments), node)


def insert_before(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert ``target(*args, **kwargs)`` in front of ``node``."""
    arguments, _ = _with_sizes_as_nodes(graph, args, kwargs)
    with graph.inserting_before(node):
        return _finish(graph.call_function(target, *arguments), node)


def _with_sizes_as_nodes(graph: fx.Graph, args: Any, kwargs: Any) -> tuple[Any, list[fx.Node]]:
    """Arguments with each size that is a symbol as a node that has it, and those nodes.

    Generated code knows a symbol only where an input of the graph has it. One that no input has becomes a number, on
    which torch then guards.
    """
    found: list[fx.Node] = []

    def as_node(argument: Any) -> Any:
        if not isinstance(argument, torch.SymInt):
            return argument
        node = _node_of_size(graph, argument)
        if node is None:
            return int(argument)
        found.append(node)
        return node

    return fx.node.map_aggregate((args, kwargs), as_node), found


def _node_of_size(graph: fx.Graph, size: torch.SymInt) -> fx.Node | None:
    placeholders = list(graph.find_nodes(op="placeholder"))
    for node in placeholders:
        if isinstance(value(node), torch.SymInt) and statically_known_true(value(node) == size):
            return node
    for node in placeholders:
        sizes = shape(node) if isinstance(value(node), torch.Tensor) else ()
        for dim, of_input in enumerate(sizes):
            if isinstance(of_input, torch.SymInt) and statically_known_true(of_input == size):
                with graph.inserting_after(placeholders[-1]):
                    new = graph.call_function(aten.sym_size.int, (node, dim))
                new.meta["val"] = size
                return new
    return None


def _finish(new: fx.Node, neighbour: fx.Node) -> fx.Node:
    new.meta["val"] = run_on_values(new)
    for key in ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id"):
        # The last two are the tags of a checkpointed region: what is computed there is recomputed there.
        if key in neighbour.meta:
            new.meta[key] = neighbour.meta[key]
    return new


def run_on_values(node: fx.Node) -> Any:
    """Run a node's operator on the fake values of its inputs. Nothing is computed and no guard is added."""
    arguments: Any = fx.node.map_arg((node.args, node.kwargs), value)
    args, kwargs = arguments
    if node.target is operator.getitem:
        return args[0][args[1]]
    with unguarded_fake_mode(value(source) for source in node.all_input_nodes):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def check_graph(pass_name: str, graph: fx.Graph, nodes: Iterable[fx.Node] | None = None) -> None:
    """Verify a graph, or some nodes of it, after a pass.

    Each operator is run again on its inputs' fake values; shape, dtype and device must be those that
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
