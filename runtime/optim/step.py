"""One step of an optimizer, from top to bottom."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from oasis_fx.errors import warn_user
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.optim.algorithm import Algorithm
from oasis_fx.runtime.optim.context import Generators, StepContext
from oasis_fx.runtime.optim.coordinates import bind_all, bind_resting, transport_pending
from oasis_fx.runtime.optim.items import Item
from oasis_fx.runtime.optim.plan import NO_GRADIENT, Plan, PlannedBatch
from oasis_fx.runtime.optim.preparation import prepare_state
from oasis_fx.runtime.optim.resizing import spend_budget
from oasis_fx.runtime.optim.settled import settle
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate, all_finite
from oasis_fx.runtime.roster import Roster
from oasis_fx.runtime.subspaces import host_reads
from oasis_fx.runtime.subspaces.basis_updates import count_steps, move_due_bases
from oasis_fx.runtime.subspaces.missed_moves import note_idle
from oasis_fx.runtime.subspaces.shards import agreed
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace

# Optimizer steps at which a budget of ranks is shared out, each time with graphs compiled anew. After 20 steps the
# activations of a new network say little about what they will be (docs/results.md).
RANK_STEPS = (100, 1000)


def take_step(optimizer: Algorithm, items: list[Item], finite: torch.Tensor) -> None:
    """Step the parameters of ``items``, move the bases, and transport the states to them.

    Args:
        finite: bool scalar: whether every gradient is finite. Where reading it costs nothing, as on a CPU, a step is
            left out where it is false; elsewhere the step is computed and its results are discarded on the device.
    """
    known = host_reads.reads_are_free(finite.device)
    if known and not bool(finite):
        leave_out(optimizer, items)
        return
    plan = make_plan(optimizer, items)
    note_idle(plan.subspaces)
    context = begin_step(optimizer, None if known else finite)
    step_low_rank(optimizer, plan.low_rank, context)
    step_dense(optimizer, plan.dense, context)
    share_ranks_out(optimizer, plan, context)
    move_all_bases(optimizer, plan, context)
    settle(optimizer, items, at_rest=plan.is_closed)
    plan.drop_gradients()


def make_plan(optimizer: Algorithm, items: list[Item]) -> Plan:
    """Return the plan of a step, when all states are where it needs them: that of the last step where it serves."""
    if optimizer.plan is not None and optimizer.plan.serves(optimizer, items):
        optimizer.plan.take_gradients()
        return optimizer.plan
    transport_pending(optimizer)
    bind_resting(optimizer, [item.weight for item in items])
    for item in items:
        prepare_state(optimizer, item)
    optimizer.plan = Plan(optimizer, items)
    return optimizer.plan


def are_finite(items: Sequence[Item]) -> torch.Tensor:
    """Return whether every gradient is finite, on all ranks that share a weight: a bool scalar on a device."""
    sharded = [item.weight for item in items if item.data is not item.weight]
    return agreed(all_finite([item.gradient for item in items]), sharded)


def leave_out(optimizer: Algorithm, items: Iterable[Item]) -> None:
    """Leave a step out: weights and step counts stay as they are, and moments change their coordinates at most.

    A basis that is chosen from the batch has moved in the forward pass. States are transported to it here, since a
    checkpoint may be made, and the next batch projected, before there is another step. The step counts under
    `every`, and states begin, as they do on a GPU, whose host does not know that the step was left out.
    """
    warnings.warn("a gradient is not finite: this step is left out", RuntimeWarning, stacklevel=5)
    transport_pending(optimizer)
    subspaces: dict[Subspace, None] = {}
    for item in items:
        prepare_state(optimizer, item)
        if item.subspace is not None:
            subspaces[item.subspace] = None
        stored = STORE.all_of(item.weight)
        subspaces |= dict.fromkeys(subspace for subspace in stored if subspace.statistic is not None)
    for subspace in count_steps(subspaces):
        subspace.drop_statistic()
    bind_all(optimizer)
    for item in items:
        item.gradient = NO_GRADIENT


def begin_step(optimizer: Algorithm, gate: torch.Tensor | None) -> StepContext:
    """Count a step, and make the random generators of its devices.

    They are seeded by the number of steps, so that they are equal on all ranks and after a resume.
    """
    group = optimizer.param_groups[0]
    seed = group["step_count"]
    group["step_count"] = seed + 1
    return StepContext(gate, Generators(seed))


def step_low_rank(optimizer: Algorithm, batches: Iterable[PlannedBatch[LowRankUpdate]], context: StepContext) -> None:
    """Step the weights whose states are in the coordinates of a basis."""
    for batch in batches:
        optimizer.step_low_rank(batch.updates, context.on(batch.device, batch.settings))


def step_dense(optimizer: Algorithm, batches: Iterable[PlannedBatch[DenseUpdate]], context: StepContext) -> None:
    """Step the weights whose states have their own shape."""
    for batch in batches:
        updates = batch.updates
        if isinstance(updates[0].gradient, LowRankGrad):  # one full-size gradient at a time
            updates = Roster(replace(update, gradient=update.gradient.to_dense()) for update in updates)
        optimizer.step_dense(updates, context.on(batch.device, batch.settings))


def share_ranks_out(optimizer: Algorithm, plan: Plan, context: StepContext) -> None:
    """Share the columns of ``rank=AutoRank(...)`` out, at the first step from each of `RANK_STEPS` on that counts."""
    group = optimizer.param_groups[0]
    plans, steps = group.get("rank_plans", 0), group["step_count"]
    if plans >= len(RANK_STEPS) or steps < RANK_STEPS[plans]:
        return
    if all(subspace.spec.budget is None for subspace in plan.members(optimizer)):
        return
    if context.gate is None or bool(context.gate):
        group["rank_plans"] = plans + 1
        spend_budget(optimizer)
        plan.forget_members()


def move_all_bases(optimizer: Algorithm, plan: Plan, context: StepContext) -> None:
    """Move the bases, and transport the states of every weight in one, those without a gradient too."""
    members = plan.members(optimizer)
    # Those of weights that keep dense states, or that another graph has put into a second one, move as well.
    stored = (subspace for subspace in optimizer.stored_subspaces() if subspace.statistic is not None)
    for device, subspaces in plan.by_device(dict.fromkeys([*members, *stored])).items():
        overlaps = move_due_bases(subspaces, context.gate_on(device))
        overlaps = {s: overlap for s, overlap in overlaps.items() if s.spec.rule.transports}
        plan.transport(optimizer, overlaps, members)
    bind_all(optimizer, members, at_rest=plan.is_closed)


def warn_of_dense_steps(optimizer: Algorithm, items: Sequence[Item]) -> None:
    """Warn where none of the matrices that take part in a step was compiled by our backend."""
    matrices = [item.weight for item in items if item.weight.dim() >= 2]
    if not matrices or any(item.subspace is not None for item in items):
        return
    if any(STORE.all_of(weight) or "features" in optimizer.state.get(weight, {}) for weight in matrices):
        return
    warn_user(
        f"{type(optimizer).__name__}: none of the {len(matrices)} matrices that take part in this step is in a "
        "subspace, so the step is a dense one: train the model that torch.compile(model, "
        "backend=oasis_backend(...)) returned, and see backend.report() for weights that were left dense"
    )
