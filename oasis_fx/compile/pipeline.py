"""The passes in their order, and the runner that checks each one.

    group_by_activation    (Dynamo's graph)   weights that read one activation share a basis
    lift_runtime_inputs    (Dynamo's graph)   one basis a group, one coordinate slot a weight
    find_weight_gradients  (joint graph)      sites, and skipped weights with the reason
    project_activations    (joint graph)      P = X Q and C = X^T P next to X
    low_rank_gradients     (joint graph)      dW -> G; the dense contraction goes
    project_gradients      (joint graph)      in place of these three, for bases of gradients: G = dW Q
    keep_changed_inputs    (joint graph)      copies of inputs that the graph changes, for the backward pass
    plan_saves             (joint graph)      under a budget: what to keep, what to compute again
    partition              (joint graph)      forward and backward, by torch's min-cut
    early_statistics       (backward graph)   C as soon as it can be, so that X can go

The first two run in `oasis_fx.compile.lowering` on every compile; the others here, and only where the compile
caches of torch have no result yet.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from functorch.compile import min_cut_rematerialization_partition
from torch import fx

from oasis_fx._torch.compiler import fx_graph_cse, is_whole_joint, leave_out_of_caches
from oasis_fx.compile.partition_within import partition_by_torch, partition_making, partition_within
from oasis_fx.errors import survive
from oasis_fx.graph.facts import LiftedWeight, Skipped, WeightGradient
from oasis_fx.graph.verifier import check_graph
from oasis_fx.passes.early_statistics import early_statistics
from oasis_fx.passes.find_weight_gradients import find_weight_gradients
from oasis_fx.passes.keep_changed_inputs import copies_not_made, keep_changed_inputs
from oasis_fx.passes.low_rank_gradients import low_rank_gradients
from oasis_fx.passes.project_activations import project_activations
from oasis_fx.passes.project_gradients import find_dense_gradients, project_gradients


@dataclass(frozen=True)
class Trace:
    """What the passes did to one joint graph.

    Attributes:
        before: the joint graph as it came, after common subexpression elimination.
        after: the rewritten joint graph, before partitioning.
        forward, backward: the two partitions.
        num_forward_outputs: how many of the joint graph's outputs the user's forward pass returns.
        sites: the rewritten weight gradients; their nodes are nodes of ``before``, by name.
        skipped: the weights left dense, with reasons.
        static_inputs: positions of the inputs whose memory never moves (parameters, bases).
    """

    before: fx.GraphModule
    after: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule
    num_forward_outputs: int
    sites: tuple[WeightGradient, ...]
    skipped: tuple[Skipped, ...]
    static_inputs: tuple[int, ...]


_observer: ContextVar[Callable[[Trace], None] | None] = ContextVar("oasis_fx_observer", default=None)


@contextmanager
def observe_traces(observer: Callable[[Trace], None]) -> Iterator[None]:
    """Within: each partitioning in this thread is shown to ``observer``.

    The report and the printer are fed by this. Nothing that a compiled graph needs to run may be, since a
    warm compile cache skips the passes.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def partition_joint(
    gm: fx.GraphModule,
    joint_inputs: Sequence[Any],
    *,
    lifted: Sequence[LiftedWeight],
    budget: int | float | None = None,
    num_fwd_outputs: int,
    compiler: str = "inductor",
    static_lifetime_input_indices: list[int] | None = None,
    **kwargs: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Rewrite a joint graph and split it into a forward and a backward graph.

    Args:
        budget: what the forward graph may keep for the backward graph at most: bytes (int), a share of what it would
            keep (float), or None for torch's own setting.

    Where anything of ours fails, the graph is partitioned as it came, with a warning: gradients are then dense, and a
    budget is left to torch's partitioner.
    """
    static = tuple(static_lifetime_input_indices or ())

    def min_cut(joint: fx.GraphModule, num_forward_outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        return min_cut_rematerialization_partition(
            joint,
            joint_inputs,
            compiler=compiler,
            num_fwd_outputs=num_forward_outputs,
            static_lifetime_input_indices=list(static),
            **kwargs,
        )

    def partition(joint: fx.GraphModule, num_forward_outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        copies = copies_not_made(joint.graph, num_forward_outputs)
        return partition_making(joint, min_cut, num_forward_outputs, copies)

    if not is_whole_joint(gm.graph):
        # The body of a higher-order operator is partitioned by itself: the runtime's inputs are not among its own.
        return min_cut(gm, num_fwd_outputs)
    as_it_came = gm.graph
    try:
        gm.graph = fx_graph_cse(as_it_came)  # the reshaped X behind q, k and v is one node only after this
        before = copy_graph(gm)
        sites, skipped = rewrite_joint(gm, lifted)
        with _checked("keep_changed_inputs", gm.graph):
            keep_changed_inputs(gm.graph, num_fwd_outputs)
        after = copy_graph(gm)
        if budget is None:
            forward, backward = partition(gm, num_fwd_outputs)
        else:
            forward, backward = partition_within(gm, copy_graph, partition, num_fwd_outputs, budget)
        early_statistics(backward.graph)
        backward.graph.lint()
        backward.recompile()
    except Exception as error:
        gm.graph = as_it_came
        before, after = copy_graph(gm), copy_graph(gm)
        sites, skipped = (), tuple(Skipped(w.weight, f"a pass failed: {error}") for w in lifted)
        with suppress(Exception):  # of the two, this one is reported
            keep_changed_inputs(gm.graph, num_fwd_outputs)
        if budget is None:
            forward, backward = partition(gm, num_fwd_outputs)
        else:
            forward, backward = partition_by_torch(gm, copy_graph, partition, num_fwd_outputs, budget)
        leave_out_of_caches()
        survive(error, "gradients of a graph stay dense", stacklevel=3)
    observer = _observer.get()
    if observer is not None:
        copies = copy_graph(forward), copy_graph(backward)  # the inner compiler goes on to change them
        observer(Trace(before, after, *copies, num_fwd_outputs, sites, skipped, static))
    return forward, backward


def rewrite_joint(
    gm: fx.GraphModule, lifted: Sequence[LiftedWeight]
) -> tuple[tuple[WeightGradient, ...], tuple[Skipped, ...]]:
    """Run the joint-graph passes on ``gm`` in place, each followed by the verifier.

    Raises:
        PassError: from a pass, or from the verifier behind it.
    """
    graph = gm.graph
    of_gradients = [weight for weight in lifted if weight.of_gradient]
    if of_gradients:
        sites, skipped = find_dense_gradients(graph, of_gradients)
        with _checked("project_gradients", graph):
            project_gradients(graph, sites)
        graph.eliminate_dead_code()
        return sites, skipped
    sites, skipped = find_weight_gradients(graph, lifted)
    if not sites:
        return sites, skipped
    with _checked("project_activations", graph):
        projections = project_activations(graph, sites)
    with _checked("low_rank_gradients", graph):
        low_rank_gradients(graph, sites, projections)
    graph.eliminate_dead_code()
    return sites, skipped


@contextmanager
def _checked(name: str, graph: fx.Graph) -> Iterator[None]:
    known = set(graph.nodes)
    yield
    # What a pass adds is what it can get wrong: old nodes keep their operator and inputs.
    check_graph(name, graph, [node for node in graph.nodes if node not in known])


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be changed; fake values are shared, node names are kept."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, nodes)
    graph.output(output)
    graph.output_node().meta = copy.copy(gm.graph.output_node().meta)
    return fx.GraphModule(gm, graph)
