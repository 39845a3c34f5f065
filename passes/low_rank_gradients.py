"""Compute each weight gradient in the coordinates of its activation's basis.

    before   dW[m,n] = dY^T[m,N] @ X[N,n]     as the gradient of W
    after    G [m,r] = dY^T[m,N] @ P[N,r]     as the gradient of S; W has None
                                              G == dW @ Q exactly, in real arithmetic

Under a rule whose gradients leave the graph dense, the gradient of W is G Q^T and S has None. Each contraction has
the Q that its own P was made with: a rule may choose one for each activation.

Rows of experts are stacked: m counts those of all of them. With P in place of what a convolution reads, the layer is
one of kernel size 1, and G its weight gradient.

Requires: ``facts.projections`` come from ``project_activations`` on this graph.
Ensures:  no output reads the dense contractions any more; `remove_dead_code` of the pipeline takes them out.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from oasis_fx._torch.joint_graphs import gradient_positions, input_placeholders
from oasis_fx.graph.edits import aten, insert_after, insert_before, outputs, prims, set_output, shape, value
from oasis_fx.graph.facts import Contraction, JointFacts, Kind, LiftedWeight, Projection, WeightGradient
from oasis_fx.graph.matricization import rows_first, stored_order
from oasis_fx.passes.project_activations import convolution_arguments, projection_key


def low_rank_gradients(gm: fx.GraphModule, facts: JointFacts) -> JointFacts:
    """Give each slot the gradient G, and each weight None in place of dW. The facts stay as they are."""
    graph = gm.graph
    placeholders = input_placeholders(graph)
    positions = gradient_positions(graph)
    for site in facts.sites:
        dtype = value(placeholders[site.inputs.slot]).dtype
        blocks = [_in_bases(graph, site, block, facts.projections, dtype) for block in site.blocks]
        if site.inputs.rule.dense:
            set_output(graph, site.position, _at_full_size(graph, site, blocks))
            continue
        parts = [_sum(graph, list(block.values())) if block else None for block in blocks]
        set_output(graph, positions[site.inputs.slot], _stacked(graph, parts, site.rows))
        set_output(graph, site.position, None)
    return facts


def _in_bases(
    graph: fx.Graph,
    site: WeightGradient,
    block: Sequence[Contraction],
    projections: Mapping[Hashable, Projection],
    dtype: torch.dtype,
) -> dict[fx.Node, fx.Node]:
    """G [m, r] of a block of rows by the basis that it is in: the sum of the contractions in that basis."""
    parts: dict[fx.Node, list[fx.Node]] = {}
    for term in block:
        projection = projections[projection_key(term, site.inputs.basis)]
        g = _CONTRACT[term.kind](graph, term, projection.p)
        if value(g).dtype != dtype:
            g = insert_before(graph, term.dense, prims.convert_element_type.default, g, dtype)
        parts.setdefault(projection.basis, []).append(g)
    return {basis: _sum(graph, found) for basis, found in parts.items()}


def _at_full_size(graph: fx.Graph, site: WeightGradient, blocks: Sequence[Mapping[fx.Node, fx.Node]]) -> fx.Node:
    """The sum of all ``G Q^T``, with the dimensions of the weight."""
    bases = {basis for block in blocks for basis in block}
    if len(bases) == 1:  # one product for all rows
        (basis,) = bases
        rows = full_size(graph, _stacked(graph, [block.get(basis) for block in blocks], site.rows), basis)
    else:
        parts = [[full_size(graph, g, basis) for basis, g in block.items()] for block in blocks]
        rows = _stacked(graph, [_sum(graph, found) if found else None for found in parts], site.rows)
    return as_stored(graph, rows, shape(outputs(graph)[site.position]), site.inputs)


def full_size(graph: fx.Graph, g: fx.Node, basis: fx.Node) -> fx.Node:
    """Insert ``G Q^T`` [m, n] in the dtype of G, whatever that of Q is."""
    last = max(g, basis)
    if value(basis).dtype != value(g).dtype:
        basis = last = insert_after(graph, last, prims.convert_element_type.default, basis, value(g).dtype)
    q_t = insert_after(graph, last, aten.permute.default, basis, [1, 0])
    return insert_after(graph, q_t, aten.mm.default, g, q_t)


def as_stored(graph: fx.Graph, rows: fx.Node, sizes: Sequence[Any], inputs: LiftedWeight) -> fx.Node:
    """Insert what gives a matrix [m, n] the dimensions of the stored weight, which has ``sizes``."""
    num_dims = len(sizes)
    in_order = [sizes[dim] for dim in rows_first(num_dims, inputs.features)]
    viewed = insert_after(graph, rows, aten.view.default, rows, in_order)
    return insert_after(graph, viewed, aten.permute.default, viewed, stored_order(num_dims, inputs.features))


def _stacked(graph: fx.Graph, blocks: Sequence[fx.Node | None], rows: Sequence[Any]) -> fx.Node:
    """Blocks of rows one behind the other; None stands for zeros, as many rows as ``rows`` says."""
    if len(blocks) == 1 and blocks[0] is not None:
        return blocks[0]
    last = max(block for block in blocks if block is not None)
    like = value(last)
    whole = []
    for block, count in zip(blocks, rows, strict=True):
        if block is None:
            size = [count, like.shape[1]]
            block = last = insert_after(graph, last, aten.full.default, size, 0.0, dtype=like.dtype, device=like.device)
        whole.append(block)
    return insert_after(graph, last, aten.cat.default, whole)


def _sum(graph: fx.Graph, parts: Sequence[fx.Node]) -> fx.Node:
    total = parts[0]
    for part in parts[1:]:
        total = insert_after(graph, max(total, part), aten.add.Tensor, total, part)
    return total


def _contract_matrices(graph: fx.Graph, term: Contraction, p: fx.Node) -> fx.Node:
    dy_t = term.dy
    if len(shape(dy_t)) == 3:  # a batched matmul with a batch of one
        dy_t = insert_before(graph, term.dense, aten.squeeze.dim, dy_t, 0)
    if not term.dy_transposed:
        dy_t = insert_before(graph, term.dense, aten.permute.default, dy_t, [1, 0])
    return insert_before(graph, term.dense, aten.mm.default, dy_t, p)


def _contract_batch(graph: fx.Graph, term: Contraction, p: fx.Node) -> fx.Node:
    dy_t = term.dy
    if not term.dy_transposed:
        dy_t = insert_before(graph, term.dense, aten.permute.default, dy_t, [0, 2, 1])
    return _stack_rows(graph, term, insert_before(graph, term.dense, aten.bmm.default, dy_t, p))


def _contract_groups(graph: fx.Graph, term: Contraction, p: fx.Node) -> fx.Node:
    if term.dense.target is not operator.getitem:
        dy_t = term.dy
        if not term.dy_transposed:
            dy_t = insert_before(graph, term.dense, aten.permute.default, dy_t, [1, 0])
        g = insert_before(graph, term.dense, aten._grouped_mm.default, dy_t, p, term.dense.args[2])
        return _stack_rows(graph, term, g)
    maker = term.dense.all_input_nodes[0]
    _, weight, offsets, dy = maker.args
    (experts, _, m), rank = shape(weight), shape(p)[1]  # type: ignore[arg-type]
    # The operator makes both gradients at once. The activation's is left to the forward operator, as it does it.
    transposed = insert_before(graph, maker, aten.permute.default, weight, [0, 2, 1])
    forward = torch.ops.transformers.grouped_mm_fallback.default
    dx = insert_before(graph, maker, forward, dy, transposed, offsets)
    for user in [u for u in maker.users if u.target is operator.getitem and u.args[1] == 0]:
        user.replace_all_uses_with(dx)
    like = _zeros(graph, term, [experts, rank, m])  # for its shape
    g = insert_before(graph, term.dense, maker.target, p, like, offsets, dy)
    g = insert_before(graph, term.dense, operator.getitem, g, 1)
    g = insert_before(graph, term.dense, aten.permute.default, g, [0, 2, 1])
    return _stack_rows(graph, term, g)


def _contract_patches(graph: fx.Graph, term: Contraction, p: fx.Node) -> fx.Node:
    dy, x, weight, bias_sizes, *geometry, mask = convolution_arguments(term)
    maker, target = term.dense.all_input_nodes[0], aten.convolution_backward.default
    if mask[0] or mask[2]:
        others = insert_before(graph, maker, target, dy, x, weight, bias_sizes, *geometry, [mask[0], False, mask[2]])
        for user in [u for u in maker.users if u.args[1] != 1]:
            user.replace_input_with(maker, others)
    m, rank, num_dims = shape(dy)[1], shape(p)[1], len(shape(p)) - 2
    like = _zeros(graph, term, [m, rank, *[1] * num_dims])  # for its shape
    ones, zeros = [1] * num_dims, [0] * num_dims
    pointwise = ones, zeros, ones, False, zeros, 1
    g = insert_before(graph, term.dense, target, dy, p, like, None, *pointwise, [False, True, False])
    g = insert_before(graph, term.dense, operator.getitem, g, 1)
    return _stack_rows(graph, term, g, rank)


def _zeros(graph: fx.Graph, term: Contraction, size: Sequence[Any]) -> fx.Node:
    like = value(term.x)
    return insert_before(graph, term.dense, aten.full.default, size, 0.0, dtype=like.dtype, device=like.device)


def _stack_rows(graph: fx.Graph, term: Contraction, g: fx.Node, rank: Any = None) -> fx.Node:
    """[experts, m, r] as [experts * m, r]."""
    size = [-1, shape(g)[2] if rank is None else rank]
    g = insert_before(graph, term.dense, aten.clone.default, g, memory_format=torch.contiguous_format)
    return insert_before(graph, term.dense, aten.view.default, g, size)


_CONTRACT = {
    Kind.MATMUL: _contract_matrices,
    Kind.BATCHED: _contract_batch,
    Kind.GROUPED: _contract_groups,
    Kind.CONVOLUTION: _contract_patches,
}
