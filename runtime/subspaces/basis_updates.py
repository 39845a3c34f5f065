"""Move bases at the end of an optimizer step, each by its rule.

`move_due_bases` is a part of a step of our own optimizers, which transport states by the overlaps that it returns.
`update_bases` does the same for a model's weights on behalf of any other optimizer, whose states nobody transports.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from oasis_fx._old_names import renamed
from oasis_fx.runtime.subspaces.batched_moves import move_by_statistics
from oasis_fx.runtime.subspaces.missed_moves import note_idle, note_stuck
from oasis_fx.runtime.subspaces.rules import BatchRule, DrawnRule
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace
from oasis_fx.runtime.subspaces.tail_updates import draw_tails


@torch.no_grad()
def move_due_bases(subspaces: Sequence[Subspace], gate: torch.Tensor | None = None) -> dict[Subspace, torch.Tensor]:
    """Count an optimizer step of each subspace, move the bases that are due, and drop all statistics.

    Bases of a `StatisticRule` move here, batched over equal shapes. One without a statistic is left out; one whose
    statistic is zero or not finite, or that cannot be orthonormalised, stays where it is, and its count of updates does
    too, as all do where ``gate`` is false. Bases of a `DrawnRule` are drawn here, whatever the gate. Those of a
    `BatchRule` move in the first forward or backward pass after they are due. Every tail is drawn anew, whether its
    basis has moved or not.

    Args:
        subspaces: on one device; one that is there several times counts once.
        gate: bool scalar on the device of the bases; None for true.

    Returns:
        The overlap R = Q^T Q+ [r, r] of the old and the new basis, for each subspace that moved here.
    """
    due: Sequence[Subspace] = count_steps(subspaces)
    if due == subspaces:  # as in most steps: a roster stays one
        due = subspaces
    overlaps = _draw_due(subspaces)
    for moved in move_by_statistics(due, gate):
        overlaps.update(zip(moved.batch.subspaces, moved.overlaps, strict=True))
        note_stuck(moved, gate)
    draw_tails(dict.fromkeys(subspaces), gate, overlaps)
    return overlaps


def count_steps(subspaces: Iterable[Subspace]) -> list[Subspace]:
    """Count an optimizer step of each subspace, and return those that are due to move by their statistic, each once.

    The others drop their statistics, which no later step uses.
    """
    due = []
    for subspace in dict.fromkeys(subspaces):
        rule = subspace.spec.rule
        if isinstance(rule, BatchRule):
            subspace.steps_since_due += 1  # set to 0 where the basis moves
        elif isinstance(rule, DrawnRule):
            subspace.steps_since_due += 1  # set to 0 where the basis is drawn
        elif subspace.statistic is not None:
            if subspace.count_step():
                due.append(subspace)
            else:
                subspace.drop_statistic()
    return due


def _draw_due(subspaces: Iterable[Subspace]) -> dict[Subspace, torch.Tensor]:
    """Draw the bases of a `DrawnRule` that are due, and return R = Q^T Q+ [r, r] of each.

    They look at no data, so on a device whose host does not know whether the step is left out they are drawn in any
    case.
    """
    drawn = (s for s in dict.fromkeys(subspaces) if isinstance(s.spec.rule, DrawnRule))
    due = [subspace for subspace in drawn if subspace.is_due]
    overlaps = {}
    for subspace in due:
        rule, before = subspace.spec.rule, subspace.basis
        assert isinstance(rule, DrawnRule) and subspace.code is not None
        subspace.steps_since_due.zero_()
        subspace.recode(rule.next_code(subspace.code))
        overlaps[subspace] = before.mT @ subspace.basis
    return overlaps


def update_bases(weights: Iterable[torch.Tensor]) -> None:
    """Move the bases that ``weights`` are in, where another optimizer than ours takes the steps.

    Call it after `optimizer.step()` and before `zero_grad()`. Our own optimizers move the bases in `step()`.

    Args:
        weights: parameters; those without a gradient are passed over.

    Raises:
        RuntimeError: a statistic was not averaged over ranks, although it has to be.
    """
    subspaces = list({s: None for weight in weights if weight.grad is not None for s in STORE.all_of(weight)})
    for subspace in subspaces:
        subspace.check_averaged()
    note_idle(subspaces)
    move_due_bases(subspaces)
    for subspace in subspaces:
        subspace.forget_pending_move()  # nobody's states follow


__getattr__ = renamed(__name__, {"advance_subspaces": "update_bases"})
