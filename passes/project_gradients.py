"""Project each weight gradient on a basis of its own, within the backward pass.

    before   dW[m,n]                      in the slot of W
    after    G [m,r] = dW @ Q             in the slot of S; None in the slot of W
             C [n,r] = dW^T @ G           goes to the gradient slot of Q, where the basis goes by it
             ||dW||^2                     goes to the gradient slot of Q's energy, where there is one

Where the rule wants the gradient itself, G is what `project_gradient` makes of dW (oasis_fx/runtime/in_graph.py).
Under a rule whose gradients leave the graph dense, W's slot gets G Q^T and S's slot stays empty.
X is kept as it was; dW is dropped as soon as G is there. It need not be a matmul: any dense gradient will do.

Ensures:  no user of dW is left among the rewritten slots but its projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from oasis_fx._torch.compiler import gradient_positions, input_placeholders
from oasis_fx.graph.edits import aten, insert_after, outputs, prims, set_output, shape, value
from oasis_fx.graph.facts import LiftedWeight, Skipped, WeightGradient
from oasis_fx.passes.low_rank_gradients import full_size, stored_layout


def find_dense_gradients(
    graph: fx.Graph, lifted: Sequence[LiftedWeight]
) -> tuple[tuple[WeightGradient, ...], tuple[Skipped, ...]]:
    """The weights that get a gradient in this graph, and the others with the reason. Changes nothing."""
    positions, values = gradient_positions(graph), outputs(graph)
    sites: list[WeightGradient] = []
    skipped: list[Skipped] = []
    for weight in lifted:
        position = positions.get(weight.weight)
        if position is None or not isinstance(values[position], fx.Node):
            skipped.append(Skipped(weight.weight, "no gradient reaches it in this graph"))
        elif weight.slot not in positions or weight.basis not in positions:
            skipped.append(Skipped(weight.weight, "AOTAutograd gave no gradient slot to the runtime's inputs"))
        else:
            sites.append(WeightGradient(weight, position, (), ()))
    return tuple(sites), tuple(skipped)


def project_gradients(graph: fx.Graph, sites: Sequence[WeightGradient]) -> int:
    """Fill the coordinate slots and empty the weights' slots; return how many weights changed."""
    placeholders, positions = input_placeholders(graph), gradient_positions(graph)
    for site in sites:
        inputs = site.inputs
        basis, slot = placeholders[inputs.basis], placeholders[inputs.slot]
        dense = outputs(graph)[site.position]
        rows = last = _as_rows(graph, dense, inputs)
        if inputs.control is not None:
            operators = torch.ops.oasis_fx
            operator = (operators.compress_gradient if inputs.dense else operators.project_gradient).default
            g = last = insert_after(graph, last, operator, rows, basis, placeholders[inputs.control])
        else:
            q = basis
            if value(q).dtype != value(rows).dtype:
                q = last = insert_after(graph, last, prims.convert_element_type.default, q, value(rows).dtype)
            g = last = insert_after(graph, last, aten.mm.default, rows, q)
        if inputs.statistic:
            last = _fill_statistic(graph, rows, g, basis, inputs, last)
        if inputs.dense:
            rows = g if inputs.control is not None else full_size(graph, g, basis)
            set_output(graph, site.position, stored_layout(graph, rows, shape(dense), inputs))
            continue
        if value(g).dtype != value(slot).dtype:
            g = insert_after(graph, last, prims.convert_element_type.default, g, value(slot).dtype)
        set_output(graph, positions[inputs.slot], g)
        set_output(graph, site.position, None)
    return len(sites)


def _as_rows(graph: fx.Graph, dense: fx.Node, inputs: LiftedWeight) -> fx.Node:
    """dW as [m, n]."""
    sizes = shape(dense)
    features = tuple(range(*inputs.features))
    rows = dense
    order = [*inputs.rows(len(sizes)), *features]
    if order != list(range(len(sizes))):
        rows = insert_after(graph, rows, aten.permute.default, rows, order)
    if len(sizes) > 2:
        rows = insert_after(
            graph, rows, aten.reshape.default, rows, [-1, torch.Size(sizes[d] for d in features).numel()]
        )
    return rows


def _fill_statistic(
    graph: fx.Graph, rows: fx.Node, g: fx.Node, basis: fx.Node, inputs: LiftedWeight, last: fx.Node
) -> fx.Node:
    positions, dtype = gradient_positions(graph), value(basis).dtype
    if value(rows).dtype != dtype:  # squares of a half-precision gradient would be lost
        rows = last = insert_after(graph, last, prims.convert_element_type.default, rows, dtype)
        g = last = insert_after(graph, last, prims.convert_element_type.default, g, dtype)
    swapped = last = insert_after(graph, last, aten.permute.default, rows, [1, 0])
    c = last = insert_after(graph, last, aten.mm.default, swapped, g)
    set_output(graph, positions[inputs.basis], c)
    if inputs.energy is not None:
        squares = last = insert_after(graph, last, aten.mul.Tensor, rows, rows)
        energy = last = insert_after(graph, last, aten.sum.default, squares)
        set_output(graph, positions[inputs.energy], energy)
    return last
