"""Project each weight gradient on a basis of its own, within the backward pass.

    before   dW[m,n]                      as the gradient of W
    after    G [m,r] = dW @ Q             as the gradient of S; W has None
             C [n,r] = dW^T @ G           leaves as the gradient of Q, where the basis moves by it
             ||dW||^2                     leaves as the gradient of Q's energy, where there is one

Where the rule wants the gradient itself, G is what `project_gradient` makes of dW (runtime/gradients/in_graph.py).
Under a rule whose gradients leave the graph dense, the gradient of W is G Q^T and S has None.
X is kept as it was; dW is dropped as soon as G is there. It need not be a matmul: any dense gradient will do.

Ensures:  nothing but its projection reads dW any more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from oasis_fx._torch.joint_graphs import gradient_positions, input_placeholders
from oasis_fx.graph.edits import aten, insert_after, outputs, prims, set_output, shape, value
from oasis_fx.graph.facts import JointFacts, LiftedWeight, Skipped, WeightGradient
from oasis_fx.graph.matricization import num_features, rows_first
from oasis_fx.passes.low_rank_gradients import as_stored, full_size


def find_dense_gradients(gm: fx.GraphModule, facts: JointFacts) -> JointFacts:
    """Find which of ``facts.lifted`` get a gradient in this graph, and why the others do not. Changes nothing."""
    positions, values = gradient_positions(gm.graph), outputs(gm.graph)
    sites: list[WeightGradient] = []
    skipped: list[Skipped] = []
    for weight in facts.lifted:
        position = positions.get(weight.weight)
        if position is None or not isinstance(values[position], fx.Node):
            skipped.append(Skipped(weight.weight, "no gradient reaches it in this graph"))
        elif weight.slot not in positions or weight.basis not in positions:
            skipped.append(Skipped(weight.weight, "AOTAutograd gave the runtime's inputs no place among the gradients"))
        else:
            sites.append(WeightGradient(weight, position, (), ()))
    return replace(facts, sites=tuple(sites), skipped=tuple(skipped))


def project_gradients(gm: fx.GraphModule, facts: JointFacts) -> JointFacts:
    """Give each slot the gradient G, and each weight None in place of dW. The facts stay as they are."""
    graph = gm.graph
    placeholders, positions = input_placeholders(graph), gradient_positions(graph)
    for site in facts.sites:
        inputs = site.inputs
        basis, slot = placeholders[inputs.basis], placeholders[inputs.slot]
        dense = outputs(graph)[site.position]
        rows = last = _as_rows(graph, dense, inputs)
        if inputs.control is not None:
            operators = torch.ops.oasis_fx
            operator = (operators.compress_gradient if inputs.rule.dense else operators.project_gradient).default
            g = last = insert_after(graph, last, operator, rows, basis, placeholders[inputs.control])
        else:
            q = basis
            if value(q).dtype != value(rows).dtype:
                q = last = insert_after(graph, last, prims.convert_element_type.default, q, value(rows).dtype)
            g = last = insert_after(graph, last, aten.mm.default, rows, q)
        if inputs.rule.statistic:
            last = _fill_statistic(graph, rows, g, basis, inputs, last)
        if inputs.rule.dense:
            rows = g if inputs.control is not None else full_size(graph, g, basis)
            set_output(graph, site.position, as_stored(graph, rows, shape(dense), inputs))
            continue
        if value(g).dtype != value(slot).dtype:
            g = insert_after(graph, last, prims.convert_element_type.default, g, value(slot).dtype)
        set_output(graph, positions[inputs.slot], g)
        set_output(graph, site.position, None)
    return facts


def _as_rows(graph: fx.Graph, dense: fx.Node, inputs: LiftedWeight) -> fx.Node:
    """dW as [m, n]."""
    rows, sizes = dense, shape(dense)
    order = rows_first(len(sizes), inputs.features)
    if order != list(range(len(sizes))):
        rows = insert_after(graph, rows, aten.permute.default, rows, order)
    if len(sizes) > 2:
        rows = insert_after(graph, rows, aten.reshape.default, rows, [-1, num_features(sizes, inputs.features)])
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
