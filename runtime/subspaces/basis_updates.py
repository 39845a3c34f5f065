"""Move the bases at the end of an optimizer step, each by its rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from oasis_fx._old_names import renamed
from oasis_fx.errors import warn_user
from oasis_fx.runtime.subspaces.orthonormalize import orthonormalize_measured
from oasis_fx.runtime.subspaces.rules import BatchRule, DrawnRule, StatisticRule
from oasis_fx.runtime.subspaces.step_size import next_log_rate, sketch
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace, drift_of

# Q + eta C / s has singular values from 1 to 1 + eta sqrt(r). At 100, C outweighs Q and yet the Gram matrix
# stays positive definite in float32, whatever the data: no fall back to Householder QR.
POWER_STEP = 100.0


@torch.no_grad()
def move_bases(subspaces: Sequence[Subspace], gate: torch.Tensor | None = None) -> dict[Subspace, torch.Tensor]:
    """Count an optimizer step of each subspace, move the bases that are due, and drop all statistics.

    Bases of a `StatisticRule` move here, batched over equal shapes. One without a statistic is left out; one whose
    statistic is zero or not finite stays where it is, and its count of updates does too, as all do where ``gate`` is
    false. Bases of a `DrawnRule` are drawn here. Those of a `BatchRule` move in the first forward or backward pass
    after they are due.

    Args:
        subspaces: on one device; one that is there several times counts once.
        gate: bool scalar on the device of the bases; None for true.

    Returns:
        The overlap R = Q^T Q+ [r, r] of the old and the new basis, for each subspace that moved here.
    """
    due = count_steps(subspaces)
    overlaps = _draw_due(subspaces, gate)
    for batch in _equal_batches(due):
        old = torch.stack([subspace.basis for subspace in batch])
        new, moved, condition = _move(old, batch, gate)
        eye = torch.eye(old.shape[-1], dtype=old.dtype, device=old.device)
        overlap = torch.where(moved, old.mT @ new, eye)
        _measure(batch, old, overlap, moved.flatten(), condition)
        if batch[0].finds_step_size:
            _adapt_rates(batch, new - old, moved.flatten())
        before = [subspace.version for subspace in batch]
        torch._foreach_copy_([subspace.basis for subspace in batch], list(new))
        torch._foreach_add_([subspace.num_updates for subspace in batch], list(moved.flatten().long()))
        for subspace, version, r in zip(batch, before, overlap, strict=True):
            subspace.drop_statistic()
            subspace.note_move(version, r)
            overlaps[subspace] = r
        _note_moves(batch, moved, gate)
    return overlaps


def count_steps(subspaces: Iterable[Subspace]) -> list[Subspace]:
    """Count an optimizer step of each subspace, and return those that are due to move by their statistic.

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


def _draw_due(subspaces: Iterable[Subspace], gate: torch.Tensor | None) -> dict[Subspace, torch.Tensor]:
    """Draw the bases of a `DrawnRule` that are due, and return R = Q^T Q+ [r, r] of each.

    In a step that is left out they stay, and are due again at the next. To know that, the gate is read, which waits
    for the device; it is read only where a basis is due.
    """
    drawn = (s for s in dict.fromkeys(subspaces) if isinstance(s.spec.rule, DrawnRule))
    due = [subspace for subspace in drawn if subspace.is_due]
    if not due or (gate is not None and not bool(gate)):
        return {}
    overlaps = {}
    for subspace in due:
        rule, before = subspace.spec.rule, subspace.basis
        assert isinstance(rule, DrawnRule) and subspace.code is not None
        subspace.steps_since_due.zero_()
        subspace.recode(rule.next_code(subspace.code))
        overlaps[subspace] = before.mT @ subspace.basis
    return overlaps


def update_bases(weights: Iterable[torch.Tensor]) -> None:
    """Move the bases of the subspaces that ``weights`` are in, on behalf of an optimizer that does not.

    Call it after `optimizer.step()` and before `zero_grad()`. Our own optimizers move their bases in `step()`.

    Args:
        weights: parameters; those without a gradient are passed over.

    Raises:
        RuntimeError: a statistic was not averaged over ranks, although it has to be.
    """
    subspaces = list({s: None for weight in weights if weight.grad is not None for s in STORE.all_of(weight)})
    for subspace in subspaces:
        subspace.check_averaged()
    note_idle(subspaces)
    move_bases(subspaces)
    for subspace in subspaces:
        subspace.overlap = None  # nobody's states follow


# Moves that a basis may miss in a row before a warning: by then it is not waiting for data, none will come.
IDLE_STEPS = 10


def note_idle(subspaces: Iterable[Subspace]) -> None:
    """Count a missed move for each subspace that nothing can move at this step, and warn at the tenth in a row.

    Args:
        subspaces: those whose weights take part in the step. Call it before they move.
    """
    for subspace in subspaces:
        rule = subspace.spec.rule
        if isinstance(rule, BatchRule):
            idle = subspace.is_due and not rule.each_batch  # its turn had come, and no batch came with it
        else:
            idle = isinstance(rule, StatisticRule) and subspace.statistic is None
        if idle:
            _count_missed(
                subspace,
                "no gradient came from a backward pass of the compiled model, which computes what the basis moves by. "
                "Train the model that torch.compile returned, or name these weights in exclude=",
            )
        elif not isinstance(rule, StatisticRule):
            subspace.num_idle_steps = 0


def _note_moves(batch: Sequence[Subspace], moved: torch.Tensor, gate: torch.Tensor | None) -> None:
    """Count missed moves of those that had a statistic, where it costs nothing to read whether they moved (CPU)."""
    if moved.device.type != "cpu" or not (gate is None or bool(gate)):
        return
    for subspace, has_moved in zip(batch, moved.flatten().tolist(), strict=True):
        if has_moved:
            subspace.num_idle_steps = 0
        else:
            _count_missed(subspace, "its statistic is zero or not finite: what these layers read is zero or overflows")


def _count_missed(subspace: Subspace, cause: str) -> None:
    subspace.num_missed += 1
    subspace.num_idle_steps += 1
    if subspace.num_idle_steps == IDLE_STEPS:
        warn_user(f"the basis of {subspace.spoken_name} has not moved for {IDLE_STEPS} optimizer steps: {cause}")


def _equal_batches(subspaces: Iterable[Subspace]) -> Iterable[list[Subspace]]:
    batches: dict[object, list[Subspace]] = {}
    for subspace in subspaces:
        basis = subspace.basis
        batches.setdefault((basis.shape, basis.dtype, basis.device, subspace.spec), []).append(subspace)
    return batches.values()


def _energies(batch: Sequence[Subspace]) -> torch.Tensor:
    return torch.stack([torch.full_like(s.energy, torch.nan) if s.energy_sum is None else s.energy_sum for s in batch])


def _measure(
    batch: Sequence[Subspace], old: torch.Tensor, overlap: torch.Tensor, moved: torch.Tensor, condition: torch.Tensor
) -> None:
    """Note captured energy, drift and condition of each basis, without waiting for the device.

    Args:
        old: bases Q [L, n, r] before the move.
        overlap: R = Q^T Q+ [L, r, r].
        moved: bool [L].
        condition: [L], as of `orthonormalize_measured`.
    """
    statistic = torch.stack([s.statistic for s in batch])  # type: ignore[misc]
    captured = (old * statistic).sum(dim=(-2, -1)) / _energies(batch)  # ||A Q||^2 = <Q, C>
    drift = drift_of(overlap)
    for name, values in (("captured_energy", captured), ("drift", drift), ("condition", condition)):
        last = torch.stack([getattr(s, name) for s in batch])
        for subspace, value in zip(batch, torch.where(moved, values, last), strict=True):
            setattr(subspace, name, value)


def _adapt_rates(batch: Sequence[Subspace], move: torch.Tensor, moved: torch.Tensor) -> None:
    """Update the step sizes that are found during training; the first move, from a random start, says nothing.

    Args:
        move: Q+ - Q [L, n, r].
        moved: bool [L].
    """
    seen = sketch(move)
    second = torch.stack([subspace.num_updates for subspace in batch]) >= 1  # counted before this move
    unknown = torch.zeros_like(seen[0])
    before = torch.stack([unknown if s.last_move is None else s.last_move for s in batch])
    log_rates = torch.stack([subspace.log_rate for subspace in batch])
    counts = moved & second
    log_rates = torch.where(counts, next_log_rate(log_rates, seen, before), log_rates)
    remembered = torch.where(counts.view(-1, 1, 1), seen, before)
    for subspace, log_rate, last in zip(batch, log_rates, remembered, strict=True):
        subspace.log_rate, subspace.last_move = log_rate, last


def _move(
    old: torch.Tensor, batch: Sequence[Subspace], gate: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the new bases [L, n, r], which of them moved [L, 1, 1], and the condition of each [L]."""
    rule = batch[0].spec.rule
    assert isinstance(rule, StatisticRule)
    statistic = torch.stack([subspace.statistic for subspace in batch])  # type: ignore[misc]
    peak = statistic.abs().amax(dim=(-2, -1), keepdim=True)
    moved = peak.isfinite() & (peak > 0)
    if gate is not None:
        moved = moved & gate
    # Divided by its largest entry first: squares could leave the exponent range.
    direction = torch.where(moved, statistic / peak, 0.0)
    energy = torch.where(moved, _energies(batch).view(-1, 1, 1) / peak, 1.0)
    first = torch.stack([subspace.num_updates for subspace in batch]).view(-1, 1, 1) == 0
    if rule.lr == "auto":
        rate = torch.stack([subspace.log_rate for subspace in batch]).exp().view(-1, 1, 1)
    else:
        rate = torch.full_like(peak, POWER_STEP if math.isinf(rule.lr) else rule.lr)
    rate = rate.masked_fill(first, POWER_STEP)
    new, condition = orthonormalize_measured(torch.where(moved, rule.step(old, direction, energy, rate), old))
    return torch.where(moved, new, old), moved, condition


__getattr__ = renamed(__name__, {"advance_subspaces": "update_bases"})
