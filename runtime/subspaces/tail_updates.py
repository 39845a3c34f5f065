"""Give subspaces new tails at the end of an optimizer step, when their bases have moved."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch

from oasis_fx.runtime.subspaces.subspace import Move, Subspace
from oasis_fx.runtime.subspaces.tails import new_tails


@torch.no_grad()
def draw_tails(
    subspaces: Iterable[Subspace], gate: torch.Tensor | None = None, moved: Container[Subspace] = ()
) -> None:
    """Give each subspace that has a tail a new one, in place, orthonormal and orthogonal to its present basis.

    Subspaces of one shape are a batch, for which each operator runs once.

    Args:
        subspaces: on one device.
        gate: bool scalar on the device; where it is false tails stay as they are. None for true.
        moved: those whose bases have moved in this step. Their move ends at the version that the tail gives them.
    """
    batches: dict[tuple[tuple[int, int], int, torch.dtype, int], list[Subspace]] = {}
    for subspace in subspaces:
        if subspace.tail is not None:
            key = subspace.shape, subspace.tail.shape[1], subspace.dtype, int(subspace.num_tails)
            batches.setdefault(key, []).append(subspace)
    for (_, t, _, count), batch in batches.items():
        drawn = new_tails(torch.stack([subspace.basis for subspace in batch]), t, count + 1)
        tails: list[torch.Tensor] = [subspace.tail for subspace in batch]  # type: ignore[misc]
        before = [subspace.version for subspace in batch]
        if gate is not None:
            drawn = torch.where(gate, drawn, torch.stack(tails))
        torch._foreach_copy_(tails, drawn.unbind())
        torch._foreach_add_([subspace.num_tails for subspace in batch], 1)
        for subspace, version in zip(batch, before, strict=True):
            last = subspace.latest_move
            if subspace in moved and last is not None:
                subspace.latest_move = Move(last.before, subspace.version, last.overlap)
            else:
                stays = torch.eye(subspace.shape[1], dtype=subspace.dtype, device=subspace.device)
                subspace.note_move(version, stays)
