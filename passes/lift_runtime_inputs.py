"""Give a graph of Dynamo inputs for the runtime's bases and coordinate slots.

    before   forward(x, W, b)
    after    forward(x, W, b, Q, S)        # Q and S are not used: only their gradients will be

AOTAutograd then makes a gradient slot for each, ``None`` so far, which the joint passes fill: C for Q, G for S.
Inputs and not constants, since a constant comes back with its old values from a warm compile cache.
"""

from __future__ import annotations

from torch import fx

from oasis_fx._torch.dynamo_graphs import mark_static_input
from oasis_fx.graph.facts import DynamoFacts


def lift_runtime_inputs(gm: fx.GraphModule, facts: DynamoFacts) -> DynamoFacts:
    """Add an input for each of ``facts.fakes`` behind the graph's own; return ``facts`` as they are.

    Args:
        gm: a copy of a graph of Dynamo, with at least one input.
    """
    last = list(gm.graph.find_nodes(op="placeholder"))[-1] if facts.fakes else None
    for name, fake in facts.fakes.items():
        assert last is not None
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(name)
        last.meta["example_value"] = fake
        mark_static_input(last)
    return facts
