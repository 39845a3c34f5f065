"""Project each activation on its basis, and form the statistic that moves the basis.

    before   X [N,n]
    after    X [N,n]
             P [N,r] = X @ Q            what the backward pass may keep in place of X
             C [n,r] = X^T @ P          goes to the gradient slot of Q

Requires: ``sites`` come from ``find_weight_gradients`` on this graph.
Ensures:  one P for each pair of activation and basis; C of a basis sums over its activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from oasis_fx.graph import (
    PassError,
    WeightGradient,
    aten,
    insert_after,
    outputs,
    prims,
    set_output,
    shape,
    value,
)
from oasis_fx.torch_private import gradient_positions

# The activation as the contraction names it, and the position of the basis among the graph's inputs.
ProjectionKey = tuple[fx.Node, bool, int]

# X^T X over many tokens passes 65504, the largest float16. A basis moves by the direction of C alone.
_FLOAT16_SCALE = 2.0**-10


def project_activations(graph: fx.Graph, sites: Sequence[WeightGradient]) -> Mapping[ProjectionKey, fx.Node]:
    """Insert P and C next to each activation; return the P nodes."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    positions = gradient_positions(graph)
    projections: dict[ProjectionKey, fx.Node] = {}
    for site in sites:
        basis = placeholders[site.inputs.basis]
        for term in site.terms:
            key = (term.x, term.x_transposed, site.inputs.basis)
            if key not in projections:
                projections[key], statistic = _project(graph, term.x, term.x_transposed, basis)
                _add_to_slot(graph, positions[site.inputs.basis], statistic)
    return projections


def _project(graph: fx.Graph, x: fx.Node, transposed: bool, basis: fx.Node) -> tuple[fx.Node, fx.Node]:
    # Next to X, not next to the gradient: the partitioner must see P as a value of the forward pass.
    last = x
    if len(shape(x)) == 3:  # a batched matmul with a batch of one
        x = last = insert_after(graph, last, aten.squeeze.dim, x, 0)
    if transposed:
        x_t, x = x, insert_after(graph, last, aten.permute.default, x, [1, 0])
        last = x
    else:
        x_t = insert_after(graph, last, aten.permute.default, x, [1, 0])
        last = x_t
    if shape(x)[1] != shape(basis)[0]:
        raise PassError("project_activations", x, f"X has {shape(x)[1]} columns, the basis {shape(basis)[0]} rows")
    dtype, q = value(x).dtype, basis
    if value(basis).dtype != dtype:
        q = last = insert_after(graph, last, prims.convert_element_type.default, basis, dtype)
    p = last = insert_after(graph, last, aten.mm.default, x, q)
    scaled = p
    if dtype == torch.float16:
        scaled = last = insert_after(graph, last, aten.mul.Tensor, p, _FLOAT16_SCALE)
    c = insert_after(graph, last, aten.mm.default, x_t, scaled)
    if value(c).dtype != value(basis).dtype:
        c = insert_after(graph, c, prims.convert_element_type.default, c, value(basis).dtype)
    return p, c


def _add_to_slot(graph: fx.Graph, position: int, statistic: fx.Node) -> None:
    present = outputs(graph)[position]
    if present is not None:
        later = max(present, statistic)
        statistic = insert_after(graph, later, aten.add.Tensor, present, statistic)
    set_output(graph, position, statistic)
