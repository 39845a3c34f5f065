"""Split a joint graph into a forward and a backward graph, within a number of bytes where there is a budget.

`oasis_fx.passes.plan_saves` decides what is kept; torch's partitioner does the rest, told by the tags that activation
checkpointing puts on nodes: every value that the backward pass needs is tagged to be kept or to be recomputed, so that
the partitioner's own cut has one solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from oasis_fx._torch.compiler import functorch_config
from oasis_fx._torch.fake_tensors import unguarded_fake_mode
from oasis_fx._torch.joint_graphs import SavedForBackwardsAOTOutput, output_descriptors, set_output_descriptors
from oasis_fx.graph.edits import ancestors, copy_graph, outputs, value
from oasis_fx.graph.facts import JointFacts, SavePlan
from oasis_fx.memory.node_costs import saved_storages
from oasis_fx.memory.recompute_prices import recompute_price
from oasis_fx.passes.keep_changed_inputs import copies_not_made

Halves = tuple[fx.GraphModule, fx.GraphModule]  # the forward and the backward graph
Partitioner = Callable[[fx.GraphModule, int], Halves]  # of a joint graph, and how many outputs are the forward's


def torch_min_cut(joint_inputs: Sequence[Any] | None, static_inputs: Sequence[int], **kwargs: Any) -> Partitioner:
    """Return torch's partitioner, with the arguments that AOTAutograd gives it for the graph of one compile."""

    def partition(joint: fx.GraphModule, num_forward_outputs: int) -> Halves:
        return min_cut_rematerialization_partition(
            joint,
            joint_inputs,
            num_fwd_outputs=num_forward_outputs,
            static_lifetime_input_indices=list(static_inputs),
            **kwargs,
        )

    return partition


def torch_min_cut_later(static_inputs: Sequence[int]) -> Partitioner:
    """Return torch's partitioner for a graph whose compile is over, as reports and plans want it."""
    min_cut = torch_min_cut(None, static_inputs)

    def partition(joint: fx.GraphModule, num_forward_outputs: int) -> Halves:
        with unguarded_fake_mode(value(node) for node in joint.graph.nodes):  # random states get fake values in it
            return min_cut(joint, num_forward_outputs)

    return partition


def keeping_copies(partition: Partitioner) -> Partitioner:
    """Return a partitioner that also keeps the copies of `oasis_fx.passes.keep_changed_inputs`."""

    def keeping(joint: fx.GraphModule, num_forward_outputs: int) -> Halves:
        copies = copies_not_made(joint.graph, num_forward_outputs)
        return partition_making(joint, partition, num_forward_outputs, copies)

    return keeping


def allow_bytes(gm: fx.GraphModule, facts: JointFacts, *, budget: int | float, partition: Partitioner) -> JointFacts:
    """Find how many bytes the forward graph may keep; split the graph at once where it keeps no more than that anyway.

    Args:
        budget: bytes of tensors that are no inputs (int), or a share of what torch's own min-cut would keep (float).
        partition: torch's partitioner, which is shown a copy.
    """
    halves, kept = _unbounded(gm, facts.num_forward_outputs, partition)
    allowed = budget if isinstance(budget, int) else int(budget * kept)
    return replace(facts, halves=halves) if kept <= allowed else replace(facts, allowed_bytes=allowed)


def split(gm: fx.GraphModule, facts: JointFacts, *, partition: Partitioner) -> JointFacts:
    """Split the graph, which is changed: as planned, or by torch's own cut where there is no plan."""
    if facts.halves is not None:
        return facts
    if facts.plan is None:
        return replace(facts, halves=partition(gm, facts.num_forward_outputs))
    with functorch_config.patch(activation_memory_budget=1.0):
        return replace(facts, halves=_split_as_planned(gm, partition, facts.num_forward_outputs, facts.plan))


def split_by_torch(
    gm: fx.GraphModule, num_forward_outputs: int, partition: Partitioner, budget: int | float | None
) -> Halves:
    """Split the graph, which is changed, by torch's own means for budgets. The arguments are those of `allow_bytes`."""
    if budget is None:
        return partition(gm, num_forward_outputs)
    unbounded, kept = _unbounded(gm, num_forward_outputs, partition)
    share = budget / max(kept, 1) if isinstance(budget, int) else budget
    if share >= 1.0:
        return unbounded
    # At 0 torch's partitioner keeps inputs alone, whatever was done to them; at next to nothing it heeds tags.
    with functorch_config.patch(activation_memory_budget=max(share, 1e-6)):
        return partition(gm, num_forward_outputs)


def _unbounded(gm: fx.GraphModule, num_forward_outputs: int, partition: Partitioner) -> tuple[Halves, int]:
    """The halves of a copy of the graph without a budget, and how many bytes the forward half keeps."""
    with functorch_config.patch(activation_memory_budget=1.0):
        halves = partition(copy_graph(gm), num_forward_outputs)
    return halves, sum(saved_storages(halves[0].graph, num_forward_outputs).values())


def _split_as_planned(
    joint: fx.GraphModule, partition: Partitioner, num_forward_outputs: int, plan: SavePlan
) -> Halves:
    for node in joint.graph.nodes:
        node.meta.pop("recompute", None)  # of checkpointed regions: the plan has heeded them
    for nodes, policy in ((plan.recomputed, CheckpointPolicy.MUST_RECOMPUTE), (plan.kept, CheckpointPolicy.MUST_SAVE)):
        for node in nodes:
            node.meta["recompute"] = policy
    for node in plan.recomputed:
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
) -> Halves:
    """Partition ``joint`` so that ``nodes``, which no forward output is computed from, can be kept.

    Torch's partitioner keeps only what the forward pass makes anyway: the nodes are among its outputs while it works.
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
