"""What AOTAutograd calls with a joint graph: the passes over it, and what happens where one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import fx

from oasis_fx._torch.compiler import leave_out_of_caches
from oasis_fx._torch.joint_graphs import is_whole_joint
from oasis_fx.compile.partition import keeping_copies, split_by_torch, torch_min_cut
from oasis_fx.compile.pipeline import merge_equal_nodes, rewrite_joint, split_joint
from oasis_fx.errors import survive
from oasis_fx.graph.edits import copy_graph
from oasis_fx.graph.facts import JointFacts, LiftedWeight, Skipped, WeightGradient
from oasis_fx.passes.keep_changed_inputs import keep_changed_inputs


@dataclass(frozen=True)
class Trace:
    """What the passes did to one joint graph.

    Attributes:
        before: the joint graph as it came, after common subexpression elimination.
        after: the rewritten joint graph, before it was split.
        forward, backward: the two halves.
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
    """Show what the passes do to each joint graph of this thread to ``observer``, within the context.

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
    static_lifetime_input_indices: list[int] | None = None,
    **kwargs: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Rewrite a joint graph and split it into a forward and a backward graph.

    Where anything of ours fails, the graph is split as it came, with a warning: gradients are then dense, and a budget
    is left to torch's partitioner.

    Args:
        lifted: the weights that are to get low-rank gradients.
        budget: what the forward graph may keep for the backward graph at most: bytes (int), a share of what it would
            keep without a budget (float), or None for torch's own setting.
        kwargs: more arguments of torch's partitioner.
    """
    static = tuple(static_lifetime_input_indices or ())
    min_cut = torch_min_cut(joint_inputs, static, **kwargs)
    if not is_whole_joint(gm.graph):
        # The body of a higher-order operator is partitioned by itself: the runtime's inputs are not among its own.
        return min_cut(gm, num_fwd_outputs)
    as_it_came = gm.graph
    facts = JointFacts(num_fwd_outputs, tuple(lifted))
    partition = keeping_copies(min_cut)
    try:
        merge_equal_nodes(gm)
        before = copy_graph(gm)
        facts = rewrite_joint(gm, facts)
        after = copy_graph(gm)
        forward, backward = split_joint(gm, facts, partition, budget)
    except Exception as error:
        gm.graph = as_it_came
        before, after = copy_graph(gm), copy_graph(gm)
        skipped = tuple(Skipped(weight.weight, f"a pass failed: {error}") for weight in lifted)
        facts = JointFacts(num_fwd_outputs, tuple(lifted), skipped=skipped)
        with suppress(Exception):  # of the two, this one is reported
            keep_changed_inputs(gm, facts)
        forward, backward = split_by_torch(gm, num_fwd_outputs, partition, budget)
        leave_out_of_caches()
        survive(error, "gradients of a graph stay dense", stacklevel=3)
    observer = _observer.get()
    if observer is not None:
        halves = copy_graph(forward), copy_graph(backward)  # the inner compiler goes on to change them
        observer(Trace(before, after, *halves, num_fwd_outputs, facts.sites, facts.skipped, static))
    return forward, backward
