"""The price of recomputing a value in the backward pass.

Prices are in bytes of memory traffic that take as long, so that they compare with the bytes that saving costs. They
rest on two ratios of a device, not on a clock: equal graphs get equal plans on every run, and caches stay valid.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from oasis_fx.graph.edits import value
from oasis_fx.memory.node_costs import is_attention, is_matmul, node_flops, value_bytes, viewed

# Matmul FLOPs done in the time that one byte takes. Measured on 2 cores of a server CPU: 220 GFLOP/s beside 13 GB/s of
# a fused activation function. For GPUs by data sheet: an H100 in bfloat16 does 300 to a byte, an A100 150.
_FLOPS_PER_BYTE = {"cpu": 16.0, "cuda": 200.0}

# A FLOP of flash attention takes longer than one of a matmul: 1.7 times on the CPU above.
_ATTENTION_SLOWDOWN = 1.7


# Operators of ATen that compute much, and for which torch has no count of FLOPs.
_UNPRICED = frozenset({"rnn", "lstm", "gru", "fft", "linalg", "svd", "qr", "cholesky", "solve", "inverse", "det"})


def recompute_price(node: fx.Node) -> float:
    """Return the price of recomputing ``node``; infinite where its result could differ or nobody knows the price.

    A matmul, a convolution or attention is priced by its FLOPs. What Inductor fuses is priced by the bytes it makes, a
    reduction by those it reads as well; a view has no price.
    """
    if not _repeats(node):
        return math.inf
    if node.target is operator.getitem or viewed(node) is not None:
        return 0.0
    if is_matmul(node):
        slowdown = _ATTENTION_SLOWDOWN if is_attention(node) else 1.0
        return slowdown * node_flops(node) / _FLOPS_PER_BYTE.get(_device(node), _FLOPS_PER_BYTE["cuda"])
    made = value_bytes(value(node))
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return float(made)
    return float(made + sum(value_bytes(value(source)) for source in node.all_input_nodes))


def _repeats(node: fx.Node) -> bool:
    """Whether running a node once more has the same result, no effect on anything else, and a price that we know."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return False  # a custom operator, a collective, a higher-order operator
    if target._schema.is_mutable or (
        torch.Tag.nondeterministic_seeded in target.tags and not _is_without_dropout(node)
    ):
        return False
    return is_matmul(node) or _UNPRICED.isdisjoint(target.overloadpacket.__name__.split("_"))


def _is_without_dropout(node: fx.Node) -> bool:
    """Attention is tagged as random for its dropout alone."""
    assert isinstance(node.target, torch._ops.OpOverload)
    given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False))
    given |= node.kwargs
    defaults = {argument.name: argument.default_value for argument in node.target._schema.arguments}
    return "dropout_p" in defaults and not given.get("dropout_p", defaults["dropout_p"])


def _device(node: fx.Node) -> str:
    leaves = torch.utils._pytree.tree_leaves(value(node))
    return next((leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)), "cpu")
