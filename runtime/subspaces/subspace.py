"""The subspace of one activation or gradient: its basis, the data that moves it, and what moves leave behind."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from oasis_fx._torch.tensors import version_of
from oasis_fx.runtime.subspaces.spec import SubspaceSpec  # pickles of 0.2 look for it in this module
from oasis_fx.runtime.subspaces.state import SAVED_FIELDS, SAVED_KEYS, SubspaceState
from oasis_fx.runtime.subspaces.tails import first_tail

# Of these fields new objects come; others are changed in place. A subspace that replaces another has other counts.
_REPLACEABLE = [(name, SAVED_KEYS[name]) for name in ("num_updates", "stored_basis", "code", "error", "last_move")]

# By number, since a compiled graph takes tensors alone: how an operator within one finds its subspace.
BY_HANDLE: WeakValueDictionary[int, Subspace] = WeakValueDictionary()
_handles = itertools.count(1)


class Move(NamedTuple):
    """One move of a basis, between two versions of it, with R = Q^T Q+ [r, r]."""

    before: int
    after: int
    overlap: torch.Tensor


class Subspace(SubspaceState):
    """The basis Q [n, r] that the weights which read one activation share, or the one of a weight's gradient.

    Its attributes are those of `SubspaceState`, and what belongs to this object:

    Attributes:
        spec: what was asked for; its rank is the basis' number of columns.
        energy: scalar that graphs take and do not read, so that there is something for ||A||^2 to be the gradient of.
        latest_move: from which version of the basis to which, where the last one is known.
        handle: number by which an operator in a compiled graph finds the subspace.
    """

    def __init__(self, spec: SubspaceSpec, state: SubspaceState) -> None:
        """Make a subspace that goes on from a state, whose tensors it takes over without a copy."""
        vars(self).update(vars(state))
        self.spec = spec
        self.energy = torch.zeros((), dtype=self.dtype, device=self.device)
        self.latest_move: Move | None = None
        self._num_recoded = 0
        self.tail = self._suitable_tail(state)
        self.handle = next(_handles)
        BY_HANDLE[self.handle] = self

    def __repr__(self) -> str:
        n, r = self.shape
        return f"Subspace(n={n}, rank={r}, rule={self.spec.rule.name!r}, dtype={self.dtype})"

    @property
    def basis(self) -> torch.Tensor:
        """The basis Q [n, r]: the stored tensor itself, or one that is made from the code of a coded rule."""
        if self.stored_basis is not None:
            return self.stored_basis
        assert self.code is not None
        return self.spec.rule.expand(self.code, *self.shape, self.dtype, self.device)

    def _suitable_tail(self, state: SubspaceState) -> torch.Tensor | None:
        """Return the tail of a state, or a new one where it has none of the shape that is asked for."""
        shape = (self.shape[0], self.spec.tail)
        if not self.spec.tail:
            return None
        if state.tail is not None and state.tail.shape == shape:
            return state.tail
        return first_tail(self.basis.detach(), self.spec.tail, int(state.num_tails))

    @property
    def frame(self) -> torch.Tensor:
        """The columns that factors of gradients have coordinates for: Q [n, r], or [Q, T] [n, r + t] with a tail."""
        return self.basis if self.tail is None else torch.cat([self.basis, self.tail], dim=1)

    @property
    def num_columns(self) -> int:
        """The number of columns of `frame`."""
        return self.shape[1] + self.spec.tail

    @property
    def finds_step_size(self) -> bool:
        """Whether the step size of its rule is found during training."""
        return getattr(self.spec.rule, "lr", None) == "auto"

    @property
    def spoken_name(self) -> str:
        """The names of its weights, as messages list them."""
        return ", ".join(self.names) or f"a weight with {self.shape[0]} in_features"

    def add_statistic(self, statistic: torch.Tensor | None, energy: torch.Tensor | None) -> None:
        """Add what one backward pass has computed; the first tensors of a step are taken over without a copy.

        Args:
            statistic: C [n, r], or None where the pass computed none.
            energy: scalar ||A||^2, or None likewise.
        """
        if statistic is not None:
            self.statistic = statistic if self.statistic is None else self.statistic.add_(statistic)
        if energy is not None:
            self.energy_sum = energy if self.energy_sum is None else self.energy_sum.add_(energy)
        self.statistic_is_local |= bool(self.replicas) and not (statistic is None and energy is None)

    def drop_statistic(self) -> None:
        """Forget the statistic and the energy that the backward passes of this step have computed."""
        self.statistic = self.energy_sum = None
        self.statistic_is_local = False

    def check_averaged(self) -> None:
        """Check that the statistic was averaged over ranks, without which bases would part from those of other ranks.

        Raises:
            RuntimeError: it was not; the message names the weights and the cure.
        """
        if self.statistic_is_local:
            raise RuntimeError(
                f"the gradients of {self.spoken_name} were not averaged over ranks: they come from "
                "torch.autograd.grad, from a backward pass under no_sync() that no other one followed, or the step is "
                "taken within the backward pass. End each step with loss.backward() outside of no_sync() before "
                "optimizer.step()"
            )

    def note_move(self, before: int, overlap: torch.Tensor) -> None:
        """Remember the move from version ``before`` to the present one, R = Q^T Q+ [r, r]."""
        self.latest_move = Move(before, self.version, overlap)

    def overlap_since(self, version: int) -> torch.Tensor | None:
        """Return R = Q^T Q+ [r, r] from the basis of a version to the present one, or None where it is not known.

        It is known for the latest move alone, and not for rules that weight the columns of their projection.
        """
        move = self.latest_move
        if move is None or (move.before, move.after) != (version, self.version) or self.projection_weights is not None:
            return None
        return move.overlap

    @property
    def projection_weights(self) -> torch.Tensor | None:
        """The factors [r] by which the rule weights the columns of its projection; None where all are 1."""
        weights = getattr(self.spec.rule, "weights", None)
        found: torch.Tensor | None = None if weights is None else weights(*self.shape)
        return found

    def count_step(self) -> bool:
        """Count an optimizer step; return whether the basis is due to move, and set the count to 0 if it is."""
        if self.spec.rule.every == 1:  # at every step, whatever the count of a checkpoint
            return True
        self.steps_since_due += 1
        due = self.is_due
        if due:
            self.steps_since_due.zero_()
        return due

    @property
    def is_due(self) -> bool:
        """Whether the basis is due to move.

        The count may exceed ``every``: that of a checkpoint comes from a run whose period may have been longer.
        """
        return int(self.steps_since_due) >= self.spec.rule.every

    @property
    def version(self) -> int:
        """A number that changes whenever the basis or the tail does."""
        of_basis = 0 if self.stored_basis is None else version_of(self.stored_basis)
        return self._num_recoded + of_basis + (0 if self.tail is None else version_of(self.tail))

    @torch.no_grad()
    def replace(self, new: torch.Tensor) -> None:
        """Move to a new basis within a forward or backward pass; optimizer states follow at the next step.

        Args:
            new: the basis [n, r], which is copied, or the code of a coded rule, which is taken over.
        """
        old, before = self.basis.detach().clone(), self.version
        if self.stored_basis is not None:
            self.stored_basis.copy_(new)
        else:
            self.code, self._num_recoded = new, self._num_recoded + 1
        present = self.basis.detach()
        stays = torch.equal(old, present)  # exactly I, which states are not multiplied by: as in a resumed run
        overlap = torch.eye(self.shape[1], dtype=self.dtype, device=self.device) if stays else old.mT @ present
        self.note_move(before, overlap)
        self.note_measure("drift", drift_of(overlap))
        self.has_pending_move = True
        if not stays:
            self.overlap = overlap if self.overlap is None else self.overlap @ overlap
        self.num_updates += 1

    def forget_pending_move(self) -> None:
        """Note that optimizer states have followed the moves since the last step, or do not have to."""
        self.has_pending_move, self.overlap = False, None

    @torch.no_grad()
    def recode(self, code: torch.Tensor) -> None:
        """Move to the basis of another code, at the end of an optimizer step.

        Args:
            code: of a coded rule, int64 on the CPU, taken over without a copy.
        """
        old, before = self.basis, self.version
        self.code, self._num_recoded = code, self._num_recoded + 1
        self.note_move(before, old.mT @ self.basis)
        self.num_updates += 1

    def entries(self) -> dict[str, Any]:
        """Return the entries that the optimizer state of a weight has of its subspace, for checkpoints, by their keys.

        Tensors are not copied: the entries change with the subspace. An entry of None is to be left out.
        """
        rule = self.spec.rule
        found = {key: getattr(self, name) for name, key in SAVED_KEYS.items()}
        if not rule.draws:
            found["basis_seed"] = None
        if not self.finds_step_size:
            found["basis_log_rate"] = None
        if self.tail is None:
            found["basis_tails"] = None
        found["basis_rank"] = self.shape[1] if rule.coded else None
        found["basis_resizable"] = None if rule.resizable else False
        return found

    def is_noted_in(self, state: Mapping[str, Any]) -> bool:
        """Return whether a weight's state holds the present objects of all entries that others may replace."""
        own = vars(self)
        for name, key in _REPLACEABLE:  # a loop, since it is asked for each weight at each step
            if state.get(key) is not own[name]:
                return False
        # These are in the states of some rules alone; `load` replaces them.
        same_rate = state.get(SAVED_KEYS["log_rate"], own["log_rate"]) is own["log_rate"]
        return same_rate and bool(state.get(SAVED_KEYS["seed"], own["seed"]) == own["seed"])

    @torch.no_grad()
    def load(self, saved: SubspaceState) -> None:
        """Take over all that a checkpoint holds of a subspace; the basis keeps its place in memory.

        The statistic of this step and moves that states have not followed yet are dropped.

        Args:
            saved: of the same shape, dtype and device, and coded where this one is.
        """
        for field in SAVED_FIELDS:
            present, value = getattr(self, field.name), getattr(saved, field.name)
            if field.name == "stored_basis" or field.metadata["kind"] == "count":
                if present is not None:
                    present.copy_(value)
            elif field.name == "tail":
                if self.tail is not None:
                    self.tail.copy_(self._suitable_tail(saved))  # type: ignore[arg-type]
            else:
                setattr(self, field.name, value)
        self.momentum = saved.momentum
        self._num_recoded += self.code is not None
        self.forget_pending_move()
        self.drop_statistic()


def drift_of(overlap: torch.Tensor) -> torch.Tensor:
    """Return how far bases have moved, ``sqrt(1 - ||R||^2 / r)`` [...], 0 to 1, from R = Q^T Q+ [..., r, r]."""
    return (1 - overlap.square().sum(dim=(-2, -1)) / overlap.shape[-1]).clamp_min(0).sqrt()
