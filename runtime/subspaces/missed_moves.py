"""Count the moves that bases miss, and warn about a basis that does not move."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from oasis_fx.errors import warn_user
from oasis_fx.runtime.subspaces import host_reads
from oasis_fx.runtime.subspaces.batched_moves import Moved
from oasis_fx.runtime.subspaces.rules import BatchRule, StatisticRule
from oasis_fx.runtime.subspaces.subspace import Subspace

# Moves that a basis may miss in a row before a warning: by then it is not waiting for data, none will come.
IDLE_STEPS = 10


def note_idle(subspaces: Iterable[Subspace]) -> None:
    """Count a missed move for each subspace that nothing can move at this step, and warn at the tenth in a row.

    Call it before the subspaces move.

    Args:
        subspaces: those whose weights take part in the step.
    """
    for subspace in subspaces:
        rule = subspace.spec.rule
        if isinstance(rule, BatchRule):
            idle = subspace.is_due and not rule.each_batch  # its turn had come, and no batch came with it
        else:
            idle = isinstance(rule, StatisticRule) and subspace.statistic is None
        if idle:
            subspace.num_missed += 1
            _count_idle(
                subspace,
                "no gradient came from a backward pass of the compiled model, which computes what the basis moves by. "
                "Train the model that torch.compile returned, or name these weights in exclude=",
            )
        elif not isinstance(rule, StatisticRule):
            subspace.num_idle_steps = 0


def note_stuck(moved: Moved, gate: torch.Tensor | None) -> None:
    """Count bases that had a statistic and could not move, where the host can read which; warn at the tenth in a row.

    They are counted on the device in any case (`Subspace.num_stuck`).

    Args:
        moved: what became of a batch of subspaces.
        gate: bool scalar on their device; nothing is counted where it is false. None for true.
    """
    if not host_reads.reads_are_free(moved.stuck.device) or not (gate is None or bool(gate)):
        return
    for subspace, stuck in zip(moved.batch.subspaces, moved.stuck.tolist(), strict=True):
        if stuck:
            _count_idle(
                subspace,
                "its statistic is zero or not finite, or cannot be orthonormalised: what these layers read is zero or "
                "overflows",
            )
        else:
            subspace.num_idle_steps = 0


def _count_idle(subspace: Subspace, cause: str) -> None:
    subspace.num_idle_steps += 1
    if subspace.num_idle_steps == IDLE_STEPS:
        warn_user(f"the basis of {subspace.spoken_name} has not moved for {IDLE_STEPS} optimizer steps: {cause}")
