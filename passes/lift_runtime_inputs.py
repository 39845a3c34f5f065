"""Give a graph of Dynamo inputs for the runtime's bases and coordinate slots.

    before   forward(x, W, b)
    after    forward(x, W, b, Q, S)        # Q and S are not used: only their gradients will be

AOTAutograd then makes a gradient slot for each, ``None`` so far, which the joint passes fill: C for Q, G for S.
Inputs and not constants, since a constant comes back with its old values from a warm compile cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from oasis_fx._torch.compiler import copy_dynamo_attributes, mark_static_input


def lift_runtime_inputs(gm: fx.GraphModule, tensors: Sequence[torch.Tensor], names: Sequence[str]) -> fx.GraphModule:
    """Return a copy of ``gm`` with one more input for each of ``tensors``, behind its own.

    Args:
        gm: graph of Dynamo. It is read again after the backend returns, so the copy is what changes.
        tensors: fake values of the new inputs.
        names: their placeholder names.
    """
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    last = list(graph.find_nodes(op="placeholder"))[-1]
    graph.output(output)
    placeholders = []
    for tensor, name in zip(tensors, names, strict=True):
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        last.meta["example_value"] = tensor
        placeholders.append(last)
    lifted = fx.GraphModule(gm, graph)
    copy_dynamo_attributes(gm, lifted)
    for placeholder in placeholders:
        mark_static_input(placeholder)
    for node in graph.nodes:
        node.meta.pop("grapharg", None)  # Dynamo's handle on the real input, which a kept graph must not keep
    return lifted
