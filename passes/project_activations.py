"""Project each activation on its basis, and form the statistic that moves the basis.

    before   X [N,n]
    after    X [N,n]
             P [N,r] = X @ Q            what the backward pass may keep in place of X
             C [n,r] = X^T @ P          leaves as the gradient of Q, where the rule wants a statistic
             ||X||^2                    leaves as the gradient of Q's energy, where there is one

Where Q has a tail T [n,t], ``P [N,r+t] = X @ [Q, T]``, and C is formed with the first r columns of P.

Where the rule wants the batch itself, Q is what `batch_basis` makes of X (runtime/gradients/in_graph.py).

The rows of X are the tokens of all experts, or the patches that a convolution reads; these are never laid out: P is
then a convolution itself, with Q^T as its weight, and C its weight gradient.

Requires: ``facts.sites`` come from ``find_weight_gradients`` on this graph.
Ensures:  one P for each pair of activation and basis; C of a basis sums over its activations.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from oasis_fx._torch.joint_graphs import gradient_positions, input_placeholders
from oasis_fx.graph.edits import aten, insert_after, outputs, prims, set_output, shape, value
from oasis_fx.graph.facts import Contraction, JointFacts, Kind, LiftedWeight, Projection
from oasis_fx.graph.verifier import PassError

# X^T X over many tokens passes 65504, the largest float16. C is formed in float16 with this factor, which is taken out
# again in the dtype of the basis: other uses of the same basis may add a C that was formed without it.
_FLOAT16_SCALE = 2.0**-10


def project_activations(gm: fx.GraphModule, facts: JointFacts) -> JointFacts:
    """Insert P and C next to each activation; the facts get the projections by `projection_key`.

    Requires: a term whose rule wants the batch itself is no convolution, whose patches are nowhere laid out.

    Raises:
        PassError: an activation has another number of features than its basis has rows.
    """
    graph = gm.graph
    placeholders = input_placeholders(graph)
    positions = gradient_positions(graph)
    projections: dict[Hashable, Projection] = {}
    for site in facts.sites:
        basis = placeholders[site.inputs.basis]
        for term in site.terms:
            key = projection_key(term, site.inputs.basis)
            if key not in projections:
                project = {Kind.CONVOLUTION: _project_patches, Kind.BATCHED: _project_batch}.get(term.kind, _project)
                projections[key], statistic = project(graph, term, basis, site.inputs)
                if statistic is None:
                    continue
                _add_to_gradient(graph, positions[site.inputs.basis], _in_units_of(graph, basis, statistic))
                if site.inputs.energy is not None:
                    energy = _energy(graph, term, value(basis).dtype)
                    _add_to_gradient(graph, positions[site.inputs.energy], energy)
    return replace(facts, projections=projections)


def projection_key(term: Contraction, basis: int) -> Hashable:
    """Return what P depends on: the activation as the contraction names it, its patches, and the basis."""
    patches = None
    if term.kind is Kind.CONVOLUTION:
        _, _, weight, _, *geometry, _ = convolution_arguments(term)
        patches = str((shape(weight)[2:], geometry))
    return term.x, term.x_transposed, term.kind is Kind.BATCHED, patches, basis


def convolution_arguments(term: Contraction) -> tuple[Any, ...]:
    """Return the arguments of the convolution_backward behind a contraction.

    They are dY, X, W, bias sizes, stride, padding, dilation, transposed, output padding, groups, output mask.
    """
    return term.dense.all_input_nodes[0].args


def _project(
    graph: fx.Graph, term: Contraction, basis: fx.Node, inputs: LiftedWeight
) -> tuple[Projection, fx.Node | None]:
    # Next to X, not next to the gradient: the partitioner must see P as a value of the forward pass.
    x = last = term.x
    if len(shape(x)) == 3:  # a batched matmul with a batch of one
        x = last = insert_after(graph, last, aten.squeeze.dim, x, 0)
    swapped = last = insert_after(graph, last, aten.permute.default, x, [1, 0])
    x, x_t = (swapped, x) if term.x_transposed else (x, swapped)
    _check_features(term, shape(x)[1], basis)
    q, last = _lent_basis(graph, x, basis, last, inputs)
    p = insert_after(graph, last, aten.mm.default, x, q)
    made = Projection(p, q if inputs.control is not None else basis)
    if not inputs.rule.statistic:
        return made, None
    scaled = _scaled(graph, _tracked(graph, p, 1, basis, inputs))
    return made, insert_after(graph, scaled, aten.mm.default, x_t, scaled)


def _project_batch(
    graph: fx.Graph, term: Contraction, basis: fx.Node, inputs: LiftedWeight
) -> tuple[Projection, fx.Node | None]:
    x = last = term.x
    swapped = last = insert_after(graph, last, aten.permute.default, x, [0, 2, 1])
    x, x_t = (swapped, x) if term.x_transposed else (x, swapped)
    _check_features(term, shape(x)[2], basis)
    rows = x
    if inputs.control is not None:
        rows = last = insert_after(graph, last, aten.reshape.default, x, [-1, shape(x)[2]])
    lent, last = _lent_basis(graph, rows, basis, last, inputs)
    q = last = insert_after(graph, last, aten.unsqueeze.default, lent, 0)
    q = last = insert_after(graph, last, aten.expand.default, q, [int(shape(x)[0]), *shape(lent)])
    p = insert_after(graph, last, aten.bmm.default, x, q)
    made = Projection(p, lent if inputs.control is not None else basis)
    if not inputs.rule.statistic:
        return made, None
    scaled = _scaled(graph, _tracked(graph, p, 2, basis, inputs))
    c = insert_after(graph, scaled, aten.bmm.default, x_t, scaled)
    return made, insert_after(graph, c, aten.sum.dim_IntList, c, [0])


def _project_patches(
    graph: fx.Graph, term: Contraction, basis: fx.Node, inputs: LiftedWeight
) -> tuple[Projection, fx.Node | None]:
    _, x, weight, _, *geometry, _ = convolution_arguments(term)
    kernel, (n, rank), num_dims = shape(weight)[1:], shape(basis), len(shape(weight))
    _check_features(term, torch.Size(kernel).numel(), basis)
    q, last = _lent_basis(graph, x, basis, x, inputs)
    q = last = insert_after(graph, last, aten.view.default, q, [*kernel, shape(q)[1]])
    q = last = insert_after(graph, last, aten.permute.default, q, [num_dims - 1, *range(num_dims - 1)])
    p = insert_after(graph, last, aten.convolution.default, x, q, None, *geometry)
    made = Projection(p, basis)
    if not inputs.rule.statistic:
        return made, None
    scaled = _scaled(graph, _tracked(graph, p, 1, basis, inputs))
    mask = [False, True, False]
    q = _tracked(graph, q, 0, basis, inputs)
    c = last = insert_after(graph, scaled, aten.convolution_backward.default, scaled, x, q, None, *geometry, mask)
    c = last = insert_after(graph, last, operator.getitem, c, 1)
    c = last = insert_after(graph, last, aten.permute.default, c, [*range(1, num_dims), 0])
    c = last = insert_after(graph, last, aten.clone.default, c, memory_format=torch.contiguous_format)
    return made, insert_after(graph, last, aten.view.default, c, [n, rank])


def _energy(graph: fx.Graph, term: Contraction, dtype: torch.dtype) -> fx.Node:
    """||X||^2 in the dtype of the basis: summed over rows, so over patches where they overlap."""
    last = x = term.x
    if value(x).dtype != dtype:
        x = last = insert_after(graph, last, prims.convert_element_type.default, x, dtype)
    squares = last = insert_after(graph, last, aten.mul.Tensor, x, x)
    if term.kind is Kind.CONVOLUTION:
        _, _, weight, _, *geometry, _ = convolution_arguments(term)
        device = value(x).device
        size = [1, *shape(weight)[1:]]
        ones = last = insert_after(graph, last, aten.full.default, size, 1.0, dtype=dtype, device=device)
        squares = last = insert_after(graph, last, aten.convolution.default, squares, ones, None, *geometry)
    # Row by row first: Inductor then sums within the kernel that makes X, and does not read X again for it.
    rows = insert_after(graph, last, aten.sum.dim_IntList, squares, [-1])
    return insert_after(graph, rows, aten.sum.default, rows)


def _check_features(term: Contraction, n: Any, basis: fx.Node) -> None:
    if n != shape(basis)[0]:
        raise PassError("project_activations", term.x, f"X has {n} columns, the basis {shape(basis)[0]} rows")


def _lent_basis(
    graph: fx.Graph, x: fx.Node, basis: fx.Node, last: fx.Node, inputs: LiftedWeight
) -> tuple[fx.Node, fx.Node]:
    """Q or [Q, T] in the dtype of X (rows by features), and the node to insert behind: that or ``last``."""
    if inputs.control is not None:
        control = input_placeholders(graph)[inputs.control]
        q = insert_after(graph, last, torch.ops.oasis_fx.batch_basis.default, x, basis, control)
        return q, q
    if inputs.tail is not None:
        basis = last = insert_after(graph, last, aten.cat.default, [basis, input_placeholders(graph)[inputs.tail]], 1)
    if value(basis).dtype == value(x).dtype:
        return basis, last
    cast = insert_after(graph, last, prims.convert_element_type.default, basis, value(x).dtype)
    return cast, cast


def _tracked(graph: fx.Graph, node: fx.Node, dim: int, basis: fx.Node, inputs: LiftedWeight) -> fx.Node:
    """What a node holds of the columns of Q, which stand before those of a tail in a dimension."""
    if inputs.tail is None:
        return node
    return insert_after(graph, node, aten.slice.Tensor, node, dim, 0, shape(basis)[1])


def _scaled(graph: fx.Graph, p: fx.Node) -> fx.Node:
    return p if value(p).dtype != torch.float16 else insert_after(graph, p, aten.mul.Tensor, p, _FLOAT16_SCALE)


def _in_units_of(graph: fx.Graph, basis: fx.Node, statistic: fx.Node) -> fx.Node:
    """C in the dtype of the basis, without the factor of `_scaled`."""
    formed_in = value(statistic).dtype
    if formed_in != value(basis).dtype:
        to_dtype = prims.convert_element_type.default
        statistic = insert_after(graph, statistic, to_dtype, statistic, value(basis).dtype)
    if formed_in == torch.float16:
        statistic = insert_after(graph, statistic, aten.mul.Tensor, statistic, 1 / _FLOAT16_SCALE)
    return statistic


def _add_to_gradient(graph: fx.Graph, position: int, statistic: fx.Node) -> None:
    present = outputs(graph)[position]
    if present is not None:
        later = max(present, statistic)
        statistic = insert_after(graph, later, aten.add.Tensor, present, statistic)
    set_output(graph, position, statistic)
