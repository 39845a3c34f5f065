"""All that happens to a graph, in order. Each entry takes a graph and facts, changes the graph, and returns facts.

`dynamo_passes` run over a copy of Dynamo's graph on every compile (`oasis_fx.compile.lowering`). The rest runs where
torch's compile caches have no result yet, when AOTAutograd has made one joint graph of the forward and the backward
pass (`oasis_fx.compile.joint`): `merge_equal_nodes` and `rewrite_joint` change it, `split_joint` makes a forward and
a backward graph of it. What a pass adds is verified before the next one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import fx

from oasis_fx._torch.compiler import fx_graph_cse
from oasis_fx.compile.groups import choose_groups
from oasis_fx.compile.partition import Halves, Partitioner, allow_bytes, split
from oasis_fx.compile.runtime_inputs import describe_runtime_inputs
from oasis_fx.graph.facts import DynamoFacts, JointFacts, LiftedWeight
from oasis_fx.graph.verifier import check_graph
from oasis_fx.passes.early_statistics import early_statistics
from oasis_fx.passes.embedding_gradients import embedding_gradients
from oasis_fx.passes.find_weight_gradients import find_weight_gradients
from oasis_fx.passes.inline_regions import inline_regions
from oasis_fx.passes.keep_changed_inputs import keep_changed_inputs
from oasis_fx.passes.lift_runtime_inputs import lift_runtime_inputs
from oasis_fx.passes.low_rank_gradients import low_rank_gradients
from oasis_fx.passes.plan_saves import plan_saves
from oasis_fx.passes.project_activations import project_activations
from oasis_fx.passes.project_gradients import find_dense_gradients, project_gradients
from oasis_fx.settings import Settings

Facts = TypeVar("Facts")
Pass = Callable[[fx.GraphModule, Facts], Facts]


def dynamo_passes(example_inputs: Sequence[Any], settings: Settings) -> tuple[Pass[DynamoFacts], ...]:
    """List what happens to Dynamo's graph: weights are chosen, and inputs added for what the runtime lends."""
    return (
        inline_regions,
        # Which weights read one activation (the analysis group_by_activation), and so share a basis.
        partial(choose_groups, example_inputs=example_inputs, settings=settings),
        partial(describe_runtime_inputs, example_inputs=example_inputs, stats=settings.stats),
        lift_runtime_inputs,
    )


def joint_passes(lifted: Sequence[LiftedWeight]) -> tuple[Pass[JointFacts], ...]:
    """List what happens to the joint graph: low-rank gradients take the place of dense ones, embeddings need less."""
    low_rank: tuple[Pass[JointFacts], ...] = (find_weight_gradients, project_activations, low_rank_gradients)
    if any(weight.rule.of_gradient for weight in lifted):
        low_rank = (find_dense_gradients, project_gradients)  # G = dW Q, and not dY^T X Q
    return (*low_rank, remove_dead_code, embedding_gradients)


def partition_passes(budget: int | float | None, partition: Partitioner) -> tuple[Pass[JointFacts], ...]:
    """List how the joint graph is split: what the forward half keeps for the backward half is decided first."""
    plan = () if budget is None else (partial(allow_bytes, budget=budget, partition=partition), plan_saves)
    return (*plan, partial(split, partition=partition))


def backward_passes() -> tuple[Pass[JointFacts], ...]:
    """List what happens to the backward graph: it gets an order in which activations can go as soon as possible."""
    return (early_statistics,)


def merge_equal_nodes(gm: fx.GraphModule) -> None:
    """Eliminate common subexpressions: the reshaped X behind q, k and v is one node only after this."""
    gm.graph = fx_graph_cse(gm.graph)


def rewrite_joint(gm: fx.GraphModule, facts: JointFacts) -> JointFacts:
    """Run the passes that rewrite a joint graph, in place.

    Raises:
        PassError: a pass met something that it requires otherwise, or left something that the verifier refuses.
    """
    return run_passes(gm, facts, (*joint_passes(facts.lifted), keep_changed_inputs))


def split_joint(gm: fx.GraphModule, facts: JointFacts, partition: Partitioner, budget: int | float | None) -> Halves:
    """Split a joint graph, which is changed, into a forward and a backward graph.

    Args:
        partition: torch's partitioner.
        budget: what the forward graph may keep for the backward graph at most: bytes (int), a share of what it would
            keep without a budget (float), or None for torch's own setting.

    Raises:
        PassError: as `rewrite_joint`.
    """
    halves = run_passes(gm, facts, partition_passes(budget, partition)).halves
    assert halves is not None  # the last of these passes has split the graph
    run_passes(halves[1], facts, backward_passes())
    return halves


def run_passes(gm: fx.GraphModule, facts: Facts, passes: Sequence[Pass[Facts]]) -> Facts:
    """Run passes over a graph, in place, one after the other. The nodes that each one adds are verified.

    Raises:
        PassError: from a pass, or from the verifier after it.
    """
    for one in passes:
        known = set(gm.graph.nodes)
        facts = one(gm, facts)
        if isinstance(facts, JointFacts) and facts.halves is None:  # a graph that has been split is used up
            # What a pass adds is what it can get wrong: old nodes keep their operator and inputs.
            check_graph(_name(one), gm.graph, [node for node in gm.graph.nodes if node not in known])
    gm.recompile()
    return facts


def remove_dead_code(gm: fx.GraphModule, facts: JointFacts) -> JointFacts:
    """Remove the dense gradients that have been replaced. A graph in which none was replaced stays as it is."""
    if facts.sites:
        gm.graph.eliminate_dead_code()
    return facts


def _name(one: Any) -> str:
    return str(getattr(one, "func", one).__name__)
