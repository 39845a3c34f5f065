"""The Oja step of OASIS: how bases follow their activations.

    Q+ = orth(Q + eta * C / s),   C = X^T X Q [n, r],   s = ||C||_F / sqrt(r)

The scale s makes eta free of units. The first step of a basis, from its random start, is a power step (eta
towards infinity): with the random start it is a randomized range finder, so from the second step on the basis
is that of the data.

Source: OASIS, arXiv 2604.09406, whose body we do not have; the scale and the first step are ours (docs/design.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from oasis_fx.runtime.low_rank_grad import LowRankGrad
from oasis_fx.runtime.orthonormalize import orthonormalize_measured
from oasis_fx.runtime.subspace import Subspace

# Q + eta C / s has singular values from 1 to 1 + eta sqrt(r). At 100, C outweighs Q and yet the Gram matrix
# stays positive definite in float32, whatever the data: no fall back to Householder QR.
POWER_STEP = 100.0


@torch.no_grad()
def move_bases(subspaces: Sequence[Subspace], gate: torch.Tensor | None = None) -> dict[Subspace, torch.Tensor]:
    """Count a step of each basis, move those whose turn it is by their statistics, and drop all statistics.

    Under ``spec.every = k`` the turn comes at each k-th call, with the statistic of that step alone. A subspace
    without a statistic is left out. One whose statistic is zero or not finite, or all where ``gate`` is false, stays
    where it is and does not count the update.

    Args:
        gate: bool scalar on the device of the bases, or None for true.

    Returns:
        For each subspace whose turn it was, the overlap R = Q^T Q+ [r, r] of the old and the new basis.
    """
    overlaps: dict[Subspace, torch.Tensor] = {}
    for batch in _equal_batches(count_steps(subspaces)):
        old = torch.stack([subspace.basis for subspace in batch])
        new, moved, condition = _oja_step(old, batch, gate)
        eye = torch.eye(old.shape[-1], dtype=old.dtype, device=old.device)
        overlap = torch.where(moved, old.mT @ new, eye)
        _measure(batch, old, overlap, moved.flatten(), condition)
        for subspace, q, r, count in zip(batch, new, overlap, moved.flatten(), strict=True):
            subspace.basis.copy_(q)
            subspace.num_updates += count
            subspace.drop_statistic()
            overlaps[subspace] = r
    return overlaps


def count_steps(subspaces: Iterable[Subspace]) -> list[Subspace]:
    """Count an optimizer step of those that have a statistic; return those whose turn it is.

    The others drop their statistics: they are of no later use.
    """
    due = []
    for subspace in dict.fromkeys(subspaces):
        if subspace.statistic is None:
            continue
        if subspace.count_step():
            due.append(subspace)
        else:
            subspace.drop_statistic()
    return due


def advance_subspaces(weights: Iterable[torch.Tensor]) -> None:
    """Move the bases behind the gradients of ``weights``, for use with an optimizer that knows nothing of them.

    Call it after `optimizer.step()` and before `zero_grad()`. `OasisAdamW` does this by itself.
    """
    gradients = [weight.grad for weight in weights]
    move_bases(list({g.subspace: None for g in gradients if isinstance(g, LowRankGrad)}))


def _equal_batches(subspaces: Iterable[Subspace]) -> Iterable[list[Subspace]]:
    batches: dict[object, list[Subspace]] = {}
    for subspace in subspaces:
        basis = subspace.basis
        batches.setdefault((basis.shape, basis.dtype, basis.device, subspace.spec), []).append(subspace)
    return batches.values()


def _measure(
    batch: Sequence[Subspace], old: torch.Tensor, overlap: torch.Tensor, moved: torch.Tensor, condition: torch.Tensor
) -> None:
    """Write down, without waiting for the device, how well each basis did and how far it moved."""
    known = [s.energy.grad if s.energy.grad is not None else torch.full_like(s.energy, torch.nan) for s in batch]
    statistic = torch.stack([s.statistic for s in batch])  # type: ignore[misc]
    captured = (old * statistic).sum(dim=(-2, -1)) / torch.stack(known)  # ||XQ||^2 = <Q, C>
    drift = (1 - overlap.square().sum(dim=(-2, -1)) / old.shape[-1]).clamp_min(0).sqrt()
    for name, values in (("captured_energy", captured), ("drift", drift), ("condition", condition)):
        last = torch.stack([getattr(s, name) for s in batch])
        for subspace, value in zip(batch, torch.where(moved, values, last), strict=True):
            setattr(subspace, name, value)


def _oja_step(
    old: torch.Tensor, batch: Sequence[Subspace], gate: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the new bases [L, n, r], which of them moved [L, 1, 1], and the condition of each [L]."""
    statistic = torch.stack([subspace.statistic for subspace in batch])  # type: ignore[misc]
    peak = statistic.abs().amax(dim=(-2, -1), keepdim=True)
    moved = peak.isfinite() & (peak > 0)
    if gate is not None:
        moved = moved & gate
    # Divided by its largest entry first: the squares in the norm could leave the exponent range.
    direction = torch.where(moved, statistic / peak, 0.0)
    scale = torch.linalg.vector_norm(direction, dim=(-2, -1), keepdim=True) / math.sqrt(old.shape[-1])
    eta = batch[0].spec.learning_rate
    first = torch.stack([subspace.num_updates for subspace in batch]).view(-1, 1, 1) == 0
    step = torch.full_like(scale, POWER_STEP if math.isinf(eta) else eta).masked_fill(first, POWER_STEP)
    new, condition = orthonormalize_measured(old + torch.where(moved, step * direction / scale, 0.0))
    return torch.where(moved, new, old), moved, condition
