"""Partition a joint graph so that its forward half keeps no more than a number of bytes for the backward half.

`oasis_fx.passes.plan_saves` decides; torch's partitioner does the rest, told by the tags that activation checkpointing
puts on nodes: every value that the backward pass needs is tagged to be kept or to be computed again, so that the
partitioner's own cut has one solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from oasis_fx._torch.compiler import (
    SavedForBackwardsAOTOutput,
    functorch_config,
    output_descriptors,
    set_output_descriptors,
)
from oasis_fx.graph.edits import ancestors, outputs
from oasis_fx.memory.node_costs import saved_storages
from oasis_fx.memory.recompute_costs import recompute_price
from oasis_fx.passes.plan_saves import SavePlan, plan_saves

Partition = tuple[fx.GraphModule, fx.GraphModule]
Partitioner = Callable[[fx.GraphModule, int], Partition]  # of a joint graph, and how many outputs are the forward's


def partition_within(
    joint: fx.GraphModule,
    copy: Callable[[fx.GraphModule], fx.GraphModule],
    partition: Partitioner,
    num_forward_outputs: int,
    budget: int | float,
) -> Partition:
    """Partition ``joint`` (changed in place) under a budget.

    Args:
        copy: copies a joint graph.
        partition: torch's partitioner, which changes what it is given.
        budget: bytes of tensors that are no inputs (int), or a share of what torch's own min-cut would keep (float).
    """
    with functorch_config.patch(activation_memory_budget=1.0):
        unbounded = partition(copy(joint), num_forward_outputs)
        kept = sum(saved_storages(unbounded[0].graph, num_forward_outputs).values())
        allowed = budget if isinstance(budget, int) else int(budget * kept)
        if kept <= allowed:
            return unbounded
        plan = plan_saves(joint.graph, num_forward_outputs, allowed)
        return _partition_as_planned(joint, partition, num_forward_outputs, plan)


def partition_by_torch(
    joint: fx.GraphModule,
    copy: Callable[[fx.GraphModule], fx.GraphModule],
    partition: Partitioner,
    num_forward_outputs: int,
    budget: int | float,
) -> Partition:
    """Partition ``joint`` by torch's own means for budgets. The arguments are those of `partition_within`."""
    with functorch_config.patch(activation_memory_budget=1.0):
        unbounded = partition(copy(joint), num_forward_outputs)
    kept = sum(saved_storages(unbounded[0].graph, num_forward_outputs).values())
    share = budget / max(kept, 1) if isinstance(budget, int) else budget
    if share >= 1.0:
        return unbounded
    # At 0 torch's partitioner keeps inputs alone, whatever was done to them; at next to nothing it heeds tags.
    with functorch_config.patch(activation_memory_budget=max(share, 1e-6)):
        return partition(joint, num_forward_outputs)


def _partition_as_planned(
    joint: fx.GraphModule, partition: Partitioner, num_forward_outputs: int, plan: SavePlan
) -> Partition:
    for node in joint.graph.nodes:
        node.meta.pop("recompute", None)  # of checkpointed regions: the plan has heeded them
    for nodes, policy in ((plan.again, CheckpointPolicy.MUST_RECOMPUTE), (plan.kept, CheckpointPolicy.MUST_SAVE)):
        for node in nodes:
            node.meta["recompute"] = policy
    for node in plan.again:
        # The plan repeats attention without dropout alone. Its tag would have random states carried around it.
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and recompute_price(node) < math.inf:
            node.target = _without_tags(node.target)
    returned = outputs(joint.graph)
    made = ancestors(node for node in returned[:num_forward_outputs] if isinstance(node, fx.Node))
    forward, backward = partition_making(
        joint, partition, num_forward_outputs, [node for node in plan.kept if node not in made]
    )
    for module in (forward, backward):
        for node in module.graph.nodes:
            node.target = getattr(node.target, "tagged", node.target)
        module.recompile()
    return forward, backward


def partition_making(
    joint: fx.GraphModule, partition: Partitioner, num_forward_outputs: int, nodes: list[fx.Node]
) -> Partition:
    """Partition ``joint`` so that ``nodes``, which no forward output is computed from, can be kept.

    Torch's partitioner keeps only what the forward pass makes anyway: they are among its outputs while it works.
    """
    _insert_outputs(joint.graph, num_forward_outputs, nodes)
    forward, backward = partition(joint, num_forward_outputs + len(nodes))
    _drop_outputs(forward.graph, num_forward_outputs, len(nodes))
    return forward, backward


@cache
def _without_tags(tagged: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return tagged(*args, **kwargs)

    run.tagged = tagged  # type: ignore[attr-defined]
    return run


def _insert_outputs(graph: fx.Graph, position: int, nodes: list[fx.Node]) -> None:
    output = graph.output_node()
    values, descriptors = outputs(graph), output_descriptors(output)
    values[position:position] = nodes
    descriptors[position:position] = [SavedForBackwardsAOTOutput(index) for index in range(len(nodes))]
    output.args = (tuple(values),)
    set_output_descriptors(output, descriptors)


def _drop_outputs(graph: fx.Graph, position: int, number: int) -> None:
    output = graph.output_node()
    values = outputs(graph)
    del values[position : position + number]
    output.args = (tuple(values),)
    descriptors = output_descriptors(output)
    if descriptors:  # torch loses them where it carries random states
        del descriptors[position : position + number]
        set_output_descriptors(output, descriptors)
