"""The move of bases by their statistics, for many at once: Q+ = orth(step(Q, C)) and all that is measured on the way.

Subspaces of one shape, dtype and rule are a batch: their bases are stacked, and each operator runs once for all of
them. Nothing here reads a number on the host; what depends on one is decided by `torch.where`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from oasis_fx._torch.precision import whole_float32_products
from oasis_fx.runtime.roster import once
from oasis_fx.runtime.subspaces.banks import as_bank, side_by_side
from oasis_fx.runtime.subspaces.orthonormalize import Orthonormalized, cholesky_orthonormalize
from oasis_fx.runtime.subspaces.rules import StatisticRule
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.step_size import next_log_rate, sketch
from oasis_fx.runtime.subspaces.subspace import Subspace, drift_of

# Q + eta C / s has singular values from 1 to 1 + eta sqrt(r). At 100, C outweighs Q and yet the Gram matrix stays
# positive definite in float32, whatever the data. No step size of a rule counts as more.
POWER_STEP = 100.0


@dataclass(frozen=True)
class Batch:
    """Subspaces of one shape, dtype, device and specification that are to move.

    Attributes:
        subspaces: L of them, each with a statistic.
        basis: Q [L, n, r], stacked.
        statistic: C [L, n, r], stacked.
        energy: ||A||^2 [L], NaN where graphs do not sum it.
    """

    subspaces: Sequence[Subspace]
    basis: torch.Tensor
    statistic: torch.Tensor
    energy: torch.Tensor


@dataclass(frozen=True)
class Moved:
    """What has become of the bases of a batch.

    Attributes:
        has_moved: bool [L].
        stuck: bool [L]: whether it should have moved and could not, since its statistic is zero or not finite, or
            since the matrix to orthonormalise was nearly of a smaller rank. It has stayed where it was.
        overlaps: R = Q^T Q+ [r, r] of each; I where it has not moved.
    """

    batch: Batch
    has_moved: torch.Tensor
    stuck: torch.Tensor
    overlaps: Sequence[torch.Tensor]


def move_by_statistics(subspaces: Sequence[Subspace], gate: torch.Tensor | None) -> Iterator[Moved]:
    """Move the bases of subspaces of one device, in place, and measure the moves.

    Args:
        subspaces: of a `StatisticRule`, each with a statistic.
        gate: bool scalar on the device; where it is false nothing moves. None for true.
    """
    by_rank: dict[tuple[int, torch.dtype], list[Batch]] = {}
    for batch in _batches(subspaces):
        by_rank.setdefault((batch.basis.shape[-1], batch.basis.dtype), []).append(batch)
    for batches in by_rank.values():
        targets = [_target(batch, gate) for batch in batches]
        found = cholesky_orthonormalize([target for target, _ in targets])
        for batch, (_, wanted), result in zip(batches, targets, found, strict=True):
            yield _settle(batch, wanted, result, gate)


def _batches(subspaces: Sequence[Subspace]) -> Iterator[Batch]:
    for batch in once(subspaces, _alike):
        basis = torch.stack([subspace.basis for subspace in batch])
        statistic = torch.stack([subspace.statistic for subspace in batch])
        unknown = basis.new_full((), torch.nan)
        energy = torch.stack([unknown if s.energy_sum is None else s.energy_sum for s in batch])
        yield Batch(batch, basis, statistic, energy)


def _alike(subspaces: Iterable[Subspace]) -> list[list[Subspace]]:
    """Return subspaces of one shape, dtype, device and specification together."""
    found: dict[object, list[Subspace]] = {}
    equal: dict[SubspaceSpec, int] = {}
    numbers: dict[int, int] = {}  # of specifications by their identity: to hash one takes as long as all else here
    for subspace in subspaces:
        number = numbers.get(id(subspace.spec))
        if number is None:
            number = numbers[id(subspace.spec)] = equal.setdefault(subspace.spec, len(equal))
        found.setdefault((subspace.shape, subspace.dtype, subspace.device, number), []).append(subspace)
    return list(found.values())


def _target(batch: Batch, gate: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrices [L, n, r] whose orthonormal parts the bases are to be, and which are to move [L, 1, 1]."""
    rule = batch.subspaces[0].spec.rule
    assert isinstance(rule, StatisticRule)
    old, statistic = batch.basis, batch.statistic
    peak = statistic.abs().amax(dim=(-2, -1), keepdim=True)
    moved = (peak > 0) & (peak < torch.inf)  # false for NaN
    if gate is not None:
        moved = moved & gate
    # Divided by its largest entry first: squares could leave the exponent range.
    direction = torch.where(moved, statistic / peak, 0.0)
    energy = torch.where(moved, batch.energy.view(-1, 1, 1) / peak, 1.0)
    first = side_by_side(batch.subspaces, "num_updates").view(-1, 1, 1) == 0
    if rule.lr == "auto":
        rate = torch.stack([subspace.log_rate for subspace in batch.subspaces]).exp().view(-1, 1, 1)
    else:
        rate = torch.full_like(peak, min(rule.lr, POWER_STEP))
    rate = rate.masked_fill(first, POWER_STEP)
    return torch.where(moved, rule.step(old, direction, energy, rate), old), moved


def _settle(batch: Batch, wanted: torch.Tensor, found: Orthonormalized, gate: torch.Tensor | None) -> Moved:
    """Write the new bases, and what is measured, into the subspaces."""
    subspaces, old = batch.subspaces, batch.basis
    moved = wanted & found.done.view(-1, 1, 1)
    new = torch.where(moved, found.q, old)
    eye = torch.eye(old.shape[-1], dtype=old.dtype, device=old.device)
    with whole_float32_products(old.device.type):
        overlap = torch.where(moved, torch.bmm(old.mT, new), eye)
    has_moved = moved.flatten()
    stuck = ~has_moved if gate is None else gate & ~has_moved
    _measure(batch, overlap, has_moved, found.condition)
    if subspaces[0].finds_step_size:
        _adapt_rates(subspaces, new - old, has_moved)
    before = [subspace.version for subspace in subspaces]
    torch._foreach_copy_([subspace.basis for subspace in subspaces], new.unbind())
    side_by_side(subspaces, "num_updates").add_(has_moved)
    side_by_side(subspaces, "num_stuck").add_(stuck)
    overlaps = overlap.unbind()
    for subspace, version, r in zip(subspaces, before, overlaps, strict=True):
        subspace.drop_statistic()
        subspace.note_move(version, r)
    return Moved(batch, has_moved, stuck, overlaps)


def _measure(batch: Batch, overlap: torch.Tensor, moved: torch.Tensor, condition: torch.Tensor) -> None:
    """Note captured energy, drift and condition of each basis.

    Args:
        overlap: R = Q^T Q+ [L, r, r].
        moved: bool [L].
        condition: [L], as of `Orthonormalized`.
    """
    captured = (batch.basis * batch.statistic).sum(dim=(-2, -1)) / batch.energy  # ||A Q||^2 = <Q, C>
    values = torch.stack([captured, drift_of(overlap), condition], dim=1)  # in the order of `MEASURES`
    # Side by side in memory, so that at the next step nothing has to be stacked.
    last = as_bank([subspace.measures for subspace in batch.subspaces])
    for subspace, found in zip(batch.subspaces, torch.where(moved.view(-1, 1), values, last).unbind(), strict=True):
        subspace.measures = found


def _adapt_rates(subspaces: Sequence[Subspace], move: torch.Tensor, moved: torch.Tensor) -> None:
    """Update the step sizes that are found during training; the first move, from a random start, says nothing.

    Args:
        move: Q+ - Q [L, n, r].
        moved: bool [L].
    """
    seen = sketch(move)
    second = side_by_side(subspaces, "num_updates") >= 1  # counted before this move
    unknown = torch.zeros_like(seen[0])
    before = torch.stack([unknown if s.last_move is None else s.last_move for s in subspaces])
    log_rates = torch.stack([subspace.log_rate for subspace in subspaces])
    counts = moved & second
    log_rates = torch.where(counts, next_log_rate(log_rates, seen, before), log_rates)
    remembered = torch.where(counts.view(-1, 1, 1), seen, before)
    for subspace, log_rate, last in zip(subspaces, log_rates, remembered, strict=True):
        subspace.log_rate, subspace.last_move = log_rate, last
