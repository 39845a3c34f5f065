"""Compute each weight gradient in the coordinates of its activation's basis.

    before   dW[m,n] = dY^T[m,N] @ X[N,n]     in the slot of W
    after    G [m,r] = dY^T[m,N] @ P[N,r]     in the slot of S; None in the slot of W
                                              G == dW @ Q exactly, in real arithmetic

Requires: ``projections`` come from ``project_activations`` on this graph and these ``sites``.
Ensures:  no user of the dense contraction is left among the rewritten slots; the runner removes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from oasis_fx.graph import (
    Contraction,
    WeightGradient,
    aten,
    insert_after,
    insert_before,
    prims,
    set_output,
    shape,
    value,
)
from oasis_fx.passes.project_activations import ProjectionKey
from oasis_fx.torch_private import gradient_positions


def low_rank_gradients(
    graph: fx.Graph, sites: Sequence[WeightGradient], projections: Mapping[ProjectionKey, fx.Node]
) -> int:
    """Fill the coordinate slots and empty the weights' slots; return how many weights changed."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    positions = gradient_positions(graph)
    for site in sites:
        slot = placeholders[site.inputs.slot]
        parts = [
            _contract(graph, term, projections[term.x, term.x_transposed, site.inputs.basis], value(slot).dtype)
            for term in site.terms
        ]
        total = parts[0]
        for part in parts[1:]:
            total = insert_after(graph, max(total, part), aten.add.Tensor, total, part)
        set_output(graph, positions[site.inputs.slot], total)
        set_output(graph, site.position, None)
    return len(sites)


def _contract(graph: fx.Graph, term: Contraction, p: fx.Node, dtype: torch.dtype) -> fx.Node:
    dy_t = term.dy
    if len(shape(dy_t)) == 3:  # a batched matmul with a batch of one
        dy_t = insert_before(graph, term.dense, aten.squeeze.dim, dy_t, 0)
    if not term.dy_transposed:
        dy_t = insert_before(graph, term.dense, aten.permute.default, dy_t, [1, 0])
    g = insert_before(graph, term.dense, aten.mm.default, dy_t, p)
    if value(g).dtype != dtype:
        g = insert_before(graph, term.dense, prims.convert_element_type.default, g, dtype)
    return g
