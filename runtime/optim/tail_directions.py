"""Step weights along their tails as well: columns outside of the basis that no state of an optimizer follows.

With U [m, r] the direction that an optimizer takes in the coordinates of Q [n, r], G [m, r] the gradient in these and
G' = dW T [m, t] the gradient in those of the tail, of each row i of the weight

    W = (1 - lr wd) W - lr s (a U Q^T + c b G' T^T),   c = (n - r) / t,   w_i^2 = ||G_i||^2 + c ||G'_i||^2

    with rank_scaling:   a_i = ||G_i|| / w_i,   b_i = ||U_i|| / w_i
    without:             a_i = 1,               b_i = ||U_i|| / max(||G_i||, sqrt(r / t) ||G'_i||)

The tail is drawn anew at each step, and ``c T T^T`` is on average the projector on all that Q leaves out: over the
steps the weight moves along the whole of its gradient, and w is on average the length of a whole row of it.
rank_scaling makes s U as long as a step of AdamW along a whole row is. So the row's step gets that length, and what
is inside of the basis and outside of it get the shares of it that they have in the gradient: a tail does not lengthen
steps, and AdamW's learning rate stays right, however little of the gradient the basis sees. Without it U is as long as
the gradient inside is, and the tail is stepped along at the same rate, as in Fira; where a row has less of its gradient
in the basis than in as many columns of the tail, the tail sets the length.

Source: the scaling, Fira, arXiv 2410.01623. That directions drawn at random learn what a tracked basis leaves out:
SARA, arXiv 2502.05790, and GrassJump, arXiv 2510.01878, which have the whole gradient. The tail, which needs no more of
it than its own columns, and the shares are ours (docs/results.md says what they are worth).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.updates import LowRankUpdate
from oasis_fx.runtime.subspaces.banks import as_bank


def with_tails(
    updates: Sequence[LowRankUpdate], minus_us: Sequence[torch.Tensor], step: Step[Any]
) -> tuple[Sequence[LowRankUpdate], Sequence[torch.Tensor]]:
    """Return updates and directions in the coordinates of [Q, T], for weights whose basis has a tail.

    Weights of equal shapes are a batch, for which each operator runs once.

    Args:
        minus_us: -U [m, r] of each, contiguous; zero where the gate of the step is false.

    Returns:
        The updates, with [Q, T] [n, r + t] for their basis, and -[a U, c b G'] [m, r + t]. Those without a tail are
        returned as they are.
    """
    if all(update.tail is None for update in updates):
        return updates, minus_us
    stepped, directions = list(updates), list(minus_us)
    batches: dict[Any, list[int]] = {}
    for place, (update, minus_u) in enumerate(zip(updates, minus_us, strict=True)):
        if update.tail is not None:
            key = minus_u.shape, minus_u.dtype, update.tail.shape, update.factor.dtype
            batches.setdefault(key, []).append(place)
    for places in batches.values():
        frames = _frames([updates[place] for place in places])
        joined = _directions([updates[place] for place in places], [minus_us[place] for place in places], step)
        for place, frame, minus_u in zip(places, frames, joined, strict=True):
            stepped[place], directions[place] = replace(updates[place], basis=frame, tail=None), minus_u
    return stepped, directions


def _directions(
    updates: Sequence[LowRankUpdate], minus_us: Sequence[torch.Tensor], step: Step[Any]
) -> Sequence[torch.Tensor]:
    minus_u = as_bank(minus_us)
    inside, outside = (
        torch.stack([getattr(update, name) for update in updates]).to(minus_u.dtype)
        for name in ("factor", "tail_factor")
    )
    n, t = updates[0].tail.shape  # type: ignore[union-attr]
    r = minus_u.shape[-1]
    c, tiny = (n - r) / t, torch.finfo(minus_u.dtype).tiny
    lengths, seen, left = _row_norms(minus_u), _row_norms(inside), _row_norms(outside)
    if step.settings.rank_scaling:
        whole = (seen.square() + c * left.square()).sqrt()
        minus_u = torch.where(whole > 0, minus_u * (seen / whole.clamp_min(tiny)), minus_u)
        per_column = whole
    else:
        per_column = torch.maximum(seen, math.sqrt(r / t) * left)
    along = -c * lengths * outside / per_column.clamp_min(tiny)
    return step.where(torch.cat([minus_u, along], dim=-1)).unbind()


def _row_norms(factors: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(factors, dim=-1, keepdim=True)


def _frames(updates: Sequence[LowRankUpdate]) -> list[torch.Tensor]:
    """Return [Q, T] for each update, made once for weights that share a basis."""
    owners = list({id(update.basis): update for update in updates}.values())
    bases, tails = (torch.stack([getattr(update, name) for update in owners]) for name in ("basis", "tail"))
    made = torch.cat([bases, tails], dim=-1).unbind()
    by_basis = {id(update.basis): frame for update, frame in zip(owners, made, strict=True)}
    return [by_basis[id(update.basis)] for update in updates]
