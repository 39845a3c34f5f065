"""Kernels, and what one node of a graph would do as one: FLOPs and bytes, from fake values alone."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx

from oasis_fx.graph.edits import value
from oasis_fx.memory.node_costs import hint, is_matmul, num_bytes, operator_of, value_bytes, viewed


class Kind(Enum):
    """What bounds a kernel, besides bytes."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    ATTENTION_BACKWARD = "attention, backward"
    FUSED = "fused"
    ADAMW = "fused AdamW"
    LOW_RANK_WEIGHTS = "low-rank weights"


@dataclass(frozen=True)
class Kernel:
    """One kernel, or several equal ones.

    Attributes:
        name: of the last node of a graph in it, or of what an optimizer does.
        dtype: of what it computes with.
        flops: a multiplication and an addition are two.
        num_bytes: read and written.
        head: size of a head, of attention.
        instructions: of all threads, where they are known to bound it.
        launches: how many kernels these are.
        block: of the model that it belongs to, by number; None of what is around the blocks.
    """

    name: str
    kind: Kind
    dtype: torch.dtype
    flops: float
    num_bytes: float
    head: int = 0
    instructions: float = 0.0
    launches: int = 1
    block: int | None = None


# What Inductor computes element by element beside the operators that are tagged so, reductions and gathers among them.
_CONSTANTS = frozenset(
    "full iota arange scalar_tensor zeros ones empty zeros_like ones_like full_like empty_like new_zeros new_ones "
    "new_full new_empty".split()
)
_FUSED = _CONSTANTS | frozenset(
    "sum mean prod amax amin any all argmax argmin max min var var_mean std cat convert_element_type where embedding "
    "index gather constant_pad_nd slice_scatter select_scatter clone copy copy_ lift_fresh_copy flip _to_copy "
    "repeat".split()
)
_GATHERS = frozenset({"embedding", "index", "gather"})
# FLOPs of one element, where it is more than one: polynomials and Newton steps.
_DEAR = dict.fromkeys(
    "exp log sin cos tanh sigmoid erf pow log1p expm1 log2 exp2 silu gelu atan2 div reciprocal sqrt rsqrt".split(), 10
)


def computes(node: fx.Node) -> bool:
    """Tell whether a node makes a tensor of its own: no view, no part of a tuple, no size."""
    if node.op != "call_function" or node.target is operator.getitem or viewed(node) is not None:
        return False
    return made_bytes(node) > 0 or isinstance(value(node), torch.Tensor)


def made_bytes(node: fx.Node) -> int:
    """Count the bytes of what a node makes.

    Operators that torch's partitioner wraps to keep the state of a generator have no values, only their parts have.
    """
    if value(node) is not None:
        return value_bytes(value(node))
    return sum(made_bytes(user) for user in node.users if user.target is operator.getitem)


def reads(node: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, int]]]:
    """Yield what a node reads: who owns the memory, through which view, and how many bytes."""
    for source in () if _name(node) in _CONSTANTS else node.all_input_nodes:
        owner, size = source, value_bytes(value(source))
        while (behind := viewed(owner)) is not None:
            owner = behind
            if isinstance(value(owner), torch.Tensor):
                size = min(size, num_bytes(value(owner)))
        if size:
            if _name(node) in _GATHERS:
                size = min(size, value_bytes(value(node)))
            yield owner, (source, size)


def origin(node: fx.Node) -> fx.Node:
    """Return the node that computes what ``node`` is a view or a part of."""
    while True:
        behind = viewed(node)
        if behind is None and node.target is operator.getitem:
            behind = node.all_input_nodes[0]
        if behind is None:
            return node
        node = behind


def is_fused(node: fx.Node) -> bool:
    """Tell whether a compiler fuses a node with others."""
    target = operator_of(node)[0]
    if target is None or is_matmul(node):
        return False
    return torch.Tag.pointwise in target.tags or _name(node) in _FUSED


def writes(node: fx.Node) -> bool:
    """Tell whether a node changes one of its inputs."""
    target = operator_of(node)[0]
    return target is not None and target._schema.is_mutable


def _name(node: fx.Node) -> str:
    target = operator_of(node)[0]
    return "" if target is None else str(target.overloadpacket.__name__)


def element_flops(node: fx.Node) -> float:
    """Count the FLOPs of an element-wise operator, by the elements that it makes or, of a reduction, reads."""
    leaves = [value(node), *(value(source) for source in node.all_input_nodes)]
    if _name(node) in _GATHERS:
        leaves = leaves[:1]
    counts = [leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return float(_DEAR.get(_name(node), 1) * max(map(hint, counts), default=0))


def input_dtype(node: fx.Node) -> torch.dtype:
    """Return the dtype of the first tensor among a node's arguments."""
    leaves = torch.utils._pytree.tree_leaves(operator_of(node)[1])
    tensors = [value(leaf) for leaf in leaves if isinstance(leaf, fx.Node)]
    return next((t.dtype for t in tensors if isinstance(t, torch.Tensor)), torch.float32)


def is_causal(node: fx.Node) -> bool:
    """Tell whether attention is told to leave out what lies in the future, and so half of its FLOPs."""
    target, args, kwargs = operator_of(node)
    assert target is not None
    given = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False))
    return bool((given | kwargs).get("is_causal", False))


def head_size(node: fx.Node) -> int:
    """Return the size of a head of attention: the last one of its query, or of the gradient of its output."""
    first = operator_of(node)[1][0]
    assert isinstance(first, fx.Node)
    return hint(value(first).shape[-1])
