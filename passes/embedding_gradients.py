"""Sum the gradient of a 16-bit embedding among the rows of the batch, and not in a float32 copy of the whole table.

Let E [V, d] be a table of bfloat16 or float16, of which N rows were read, and dY [N, d] the gradients of these:

    before   dE = round(sum of dY at its rows, into zeros [V, d] of float32)      float32 [V, d], then 16 bits [V, d]
    after    S = sum of dY at the first place of its token, into zeros [N, d] of float32
             dE = round(S) written at its rows, into zeros [V, d] of 16 bits

The numbers are the same: rows that were read several times are summed in float32, and rounded once. For a vocabulary of
128,256 and d = 4096 the table in float32 would be 1.96 GiB, which is the peak of many a step; S is 32 MiB for 2048
tokens.

Requires: fake values on every node.
Ensures:  every output is as before, to the order in which a row's gradients are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from oasis_fx.graph.edits import aten, insert_before, prims, shape, value
from oasis_fx.graph.facts import JointFacts
from oasis_fx.memory.node_costs import hint

_HALF = (torch.bfloat16, torch.float16)
_CASTS = (prims.convert_element_type.default, aten._to_copy.default)
_PUTS = (aten._unsafe_index_put.default, aten.index_put.default)


class _Sum(NamedTuple):
    """What adds rows up in a float32 table: ``table[indices] += rows where mask``.

    Attributes:
        node: the table afterwards, float32 [V, ...].
        indices: int64, of any shape.
        rows: float32, [*shape of indices, ...].
        mask: bool, of as many dimensions as rows; None where all rows count.
    """

    node: fx.Node
    indices: fx.Node
    rows: fx.Node
    mask: fx.Node | None


def embedding_gradients(gm: fx.GraphModule, facts: JointFacts) -> JointFacts:
    """Rewrite the gradients of 16-bit tables that are larger than what was read of them; return ``facts``."""
    for node in list(gm.graph.nodes):
        if node.target in _CASTS and isinstance(value(node), torch.Tensor) and value(node).dtype in _HALF:
            found = _read_sum(node.args[0])
            if found is not None and _is_worth_it(found):
                node.replace_all_uses_with(_sum_in_batch(gm.graph, node, found))
                _erase_unused(gm.graph, node)
    return facts


def _read_sum(node: Any) -> _Sum | None:
    """Read a sum into a new float32 table that nothing else reads."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    arguments: Any = node.args
    mask = None
    if node.target is aten._unsafe_masked_index_put_accumulate.default:
        table, mask, indices, rows = arguments
    elif node.target in _PUTS and len(arguments) == 4 and arguments[3] is True:
        table, indices, rows = arguments[:3]
    else:
        return None
    if not _is_zero(table) or value(table).dtype != torch.float32 or len(indices) != 1 or indices[0] is None:
        return None
    read, rest = shape(indices[0]), shape(table)[1:]
    if value(indices[0]).dtype != torch.int64 or not _equal(shape(rows), (*read, *rest)):
        return None
    if mask is not None and not _equal(shape(mask), (*read, *[1] * len(rest))):
        return None
    return _Sum(node, indices[0], rows, mask)


def _equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal, without a guard on sizes that vary."""
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def _is_zero(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.full.default:
        return bool(node.args[1] == 0)
    return node.target in (aten.new_zeros.default, aten.zeros.default)


def _is_worth_it(found: _Sum) -> bool:
    """Whether fewer rows were read than the table has; of sizes that vary, those that are compiled with count."""
    table = shape(found.node)
    rows = value(found.indices).numel()
    return all(isinstance(size, int) for size in table) and 0 < 2 * hint(rows) <= table[0]


def _sum_in_batch(graph: fx.Graph, cast: fx.Node, found: _Sum) -> fx.Node:
    """Insert the sum among the rows of the batch, and return the table [V, ...] of 16 bits."""

    def new(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_before(graph, cast, target, *args, **kwargs)

    vocabulary, *rest = shape(found.node)
    dtype, device = value(cast).dtype, value(cast).device
    indices = new(aten.reshape.default, found.indices, [-1])
    rows = new(aten.reshape.default, found.rows, [-1, *rest])
    if found.mask is not None:  # of rows that do not count, zeros are added to the first row of the table
        mask = new(aten.reshape.default, found.mask, [-1])
        columns = new(aten.reshape.default, found.mask, [-1, *[1] * len(rest)])
        indices = new(aten.where.self, mask, indices, _zero(new, torch.int64, device))
        rows = new(aten.where.self, columns, rows, _zero(new, torch.float32, device))
    # Each token gets one of its places in the batch, which is where all of its rows are summed. Which of them does not
    # matter, so it does not matter either which one a GPU writes last.
    zeros = new(aten.mul.Tensor, indices, 0)  # as many as the batch has rows, which may be a symbol
    places = new(aten.sub.Tensor, new(aten.cumsum.default, new(aten.add.Tensor, zeros, 1), 0), 1)
    by_token = new(aten.full.default, [vocabulary], 0, dtype=torch.int64, device=device)
    by_token = new(aten.index_put.default, by_token, [indices], places)
    place = new(aten.index.Tensor, by_token, [indices])
    never = new(aten.reshape.default, new(aten.lt.Scalar, zeros, 0), [-1, *[1] * len(rest)])
    empty = new(aten.where.self, never, rows, _zero(new, torch.float32, device))
    sums = new(aten.index_put.default, empty, [place], rows, True)
    rounded = new(prims.convert_element_type.default, new(aten.index.Tensor, sums, [place]), dtype)
    table = new(aten.full.default, [vocabulary, *rest], 0, dtype=dtype, device=device)
    return new(aten.index_put.default, table, [indices], rounded)


def _zero(new: Any, dtype: torch.dtype, device: torch.device) -> fx.Node:
    zero: fx.Node = new(aten.full.default, [], 0, dtype=dtype, device=device)
    return zero


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads, and what was there for it alone."""
    pending: Sequence[fx.Node] = [node]
    while pending:
        unused = [one for one in pending if not one.users and one.op == "call_function"]
        inputs: dict[fx.Node, None] = {}
        for one in unused:
            inputs |= dict.fromkeys(one.all_input_nodes)
            graph.erase_node(one)
        pending = list(inputs)
