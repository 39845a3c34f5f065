"""The subspace of one activation or gradient: its basis, and what its rule goes by."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from oasis_fx._torch.tensors import version_of

if TYPE_CHECKING:
    from oasis_fx.runtime.subspaces.rules import Rule

# By number, since a compiled graph takes tensors alone: how an operator within one finds its subspace and its call.
BY_HANDLE: WeakValueDictionary[int, Subspace] = WeakValueDictionary()
BY_CALL: WeakValueDictionary[int, Versions] = WeakValueDictionary()
_handles, _calls = itertools.count(1), itertools.count(1)


class Versions:
    """The versions of bases that one call of a compiled graph has used.

    A basis that goes by the batch may move in the forward pass or, where the partitioner computes P there, in the
    backward pass: its operator notes what it gave out.
    """

    def __init__(self) -> None:
        self.call = next(_calls)
        self._used: dict[Subspace, set[int]] = {}
        BY_CALL[self.call] = self

    def note(self, subspace: Subspace) -> None:
        self._used.setdefault(subspace, set()).add(subspace.version)

    def hold(self, subspace: Subspace) -> bool:
        """Whether what was computed in its basis is still in its basis."""
        return self._used.get(subspace, set()) <= {subspace.version}


@dataclass(frozen=True)
class SubspaceSpec:
    """What a subspace is asked to be.

    Attributes:
        rank: columns of the basis, from 1.
        rule: how the basis is chosen and moves, with its settings; a name stands for the rule with its defaults.
        budget: share of n to begin with, where ``rank`` is shared out during training
            (`oasis_fx.runtime.subspaces.rank_allocation`).

    Raises:
        ValueError: naming the value and what is allowed.
    """

    rank: int
    rule: Rule = "oja"  # type: ignore[assignment]
    budget: float | None = None

    def __post_init__(self) -> None:
        from oasis_fx.runtime.subspaces.rules import rule_of  # they import this module

        object.__setattr__(self, "rule", rule_of(self.rule))
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}: it must be a whole number from 1")


@dataclass(frozen=True)
class Momentum:
    """The first moment of the one weight of a subspace, as its optimizer keeps it.

    Attributes:
        mean: m [rows, r], in the basis' present coordinates, not bias-corrected; changes with the optimizer's.
        step: the optimizer's count of steps.
        beta: its decay a step.
    """

    mean: torch.Tensor
    step: torch.Tensor
    beta: float

    def corrected(self) -> torch.Tensor:
        """m^, or zeros before the first step."""
        bias = 1 - self.beta ** self.step.double()
        return self.mean / torch.where(bias > 0, bias, 1.0).to(self.mean)


class Family:
    """Subspaces that one compiled graph serves in turn, as those of equal layers: so they have one rank."""

    def __init__(self) -> None:
        self._parent: Family | None = None

    def root(self) -> Family:
        """The same object for all that were joined."""
        found = self
        while found._parent is not None:
            found = found._parent
        return found

    def join(self, other: Family) -> None:
        one, another = self.root(), other.root()
        if one is not another:
            another._parent = one


@dataclass(frozen=True)
class Move:
    """One move of a basis, between two versions of it, with R = Q^T Q+ [r, r]."""

    before: int
    after: int
    overlap: torch.Tensor


class Subspace:
    """The basis Q [n, r] that the weights which read one activation share, or the one of a weight's gradient.

    Attributes:
        spec: what was asked for; its rank is the basis' number of columns.
        shape: (n, r).
        code: where the rule is coded: int64 on the CPU, what the basis is made from at each use; else None.
        names: of its weights, as the first graph that used it knows them; empty before.
        statistic: C [n, r] = A^T A Q, summed over the backward passes of this step; None before the first.
        energy_sum: scalar ||A||^2, summed likewise; None where graphs do not compute it.
        energy: scalar that graphs take and do not read, so that there is something for ||A||^2 to be the gradient of.
        num_updates: int64 scalar on the basis' device: how often the basis has moved.
        num_steps: int64 scalar on the CPU: optimizer steps since the basis last had its turn to move (`Rule.every`).
        overlap: R = Q^T Q+ [r, r] of the moves within backward passes since the last optimizer step; None for none.
        num_idle_steps: optimizer steps in a row in which its weights took part and the basis did not move for want of
            a statistic.
        num_missed: all of those, and the turns at which the statistic was zero or not finite where that is known.
        replicas: the ranks over which gradients and statistics are averaged, so that all of them have the same basis;
            empty where none are.
        statistic_is_local: whether the statistic, which is to be averaged over ranks, has something that was not.
        momentum: for rules that use it: set by the optimizer.
        error: for rules with error feedback: E [rows, n].
        family: the subspaces whose rank is also that of this one.
        log_rate: scalar: the logarithm of the step size under ``lr="auto"``; 0 at first.
        last_move: what is remembered of the last move, for that.
        captured_energy, drift, condition: scalars of the last move, on the basis' device; NaN before. What they are:
            `oasis_fx.inspect.stats.SubspaceStats`.

    A stored basis is a tensor [n, r], float32 (float64 for float64 weights), allocated once and changed in place
    only, so that CUDA graphs may keep its address.
    """

    def __init__(
        self,
        basis: torch.Tensor,
        spec: SubspaceSpec,
        num_updates: int = 0,
        num_steps: int | None = None,
        *,
        seed: int = 0,
        code: torch.Tensor | None = None,
    ) -> None:
        """Args:
        basis: the basis to start from; of a coded rule, for its shape, dtype and device.
        seed: tells subspaces of one shape apart where a rule draws at random.
        """
        rule = spec.rule
        self.spec, self.seed = spec, seed
        self.shape = (basis.shape[0], basis.shape[1])
        self.dtype, self.device = basis.dtype, basis.device
        self.code = code if code is not None or not rule.coded else rule.first_code(basis.shape[1], seed)
        self._stored = None if rule.coded else basis.detach().contiguous()
        self._num_recoded = 0
        self.names: tuple[str, ...] = ()
        self.statistic: torch.Tensor | None = None
        self.energy_sum: torch.Tensor | None = None
        self.energy = torch.zeros((), dtype=basis.dtype, device=basis.device)
        self.num_updates = torch.tensor(num_updates, device=basis.device)
        # A basis that waits for data is random: its turn is the first step, not the k-th.
        self.num_steps = torch.tensor(_first_count(spec) if num_steps is None else num_steps, device="cpu")
        self.family = Family()
        self.overlap: torch.Tensor | None = None
        self.latest_move: Move | None = None
        self.num_idle_steps = self.num_missed = 0
        self.replicas: frozenset[int] = frozenset()
        self.statistic_is_local = False
        self.momentum: Momentum | None = None
        self.error: torch.Tensor | None = None
        self.log_rate = torch.zeros((), dtype=basis.dtype, device=basis.device)
        self.last_move: torch.Tensor | None = None
        unknown = torch.full((), torch.nan, dtype=basis.dtype, device=basis.device)
        self.captured_energy = self.drift = self.condition = unknown
        self.handle = next(_handles)
        BY_HANDLE[self.handle] = self

    def __repr__(self) -> str:
        n, r = self.shape
        return f"Subspace(n={n}, rank={r}, rule={self.spec.rule.name!r}, dtype={self.dtype})"

    @property
    def basis(self) -> torch.Tensor:
        """Q [n, r]; of a coded rule, made anew."""
        if self._stored is not None:
            return self._stored
        assert self.code is not None
        return self.spec.rule.expand(self.code, *self.shape, self.dtype, self.device)

    @property
    def finds_step_size(self) -> bool:
        """Whether the step size of its rule is found during training."""
        return getattr(self.spec.rule, "lr", None) == "auto"

    @property
    def spoken_name(self) -> str:
        """The names of its weights, for messages."""
        return ", ".join(self.names) or f"a weight with {self.shape[0]} in_features"

    @torch.no_grad()
    def add_statistic(self, statistic: torch.Tensor | None, energy: torch.Tensor | None) -> None:
        """Add what one backward pass has computed; tensors are taken over without a copy."""
        if statistic is not None:
            self.statistic = statistic if self.statistic is None else self.statistic.add_(statistic)
        if energy is not None:
            self.energy_sum = energy if self.energy_sum is None else self.energy_sum.add_(energy)
        self.statistic_is_local |= bool(self.replicas) and not (statistic is None and energy is None)

    def drop_statistic(self) -> None:
        self.statistic = self.energy_sum = None
        self.statistic_is_local = False

    def check_averaged(self) -> None:
        """Raise where the basis would move by what one rank alone has seen, away from those of other ranks.

        Raises:
            RuntimeError: naming the weights and the cure.
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
        """R = Q^T Q+ [r, r] from the basis of that version to the present one, or None where it is not known.

        It is known for the latest move alone, and not for rules that weigh the columns of their projection.
        """
        move = self.latest_move
        if move is None or (move.before, move.after) != (version, self.version) or self.projection_weights is not None:
            return None
        return move.overlap

    @property
    def projection_weights(self) -> torch.Tensor | None:
        """Factors [r] of the columns in the projection of the rule; None for ones."""
        weights = getattr(self.spec.rule, "weights", None)
        found: torch.Tensor | None = None if weights is None else weights(*self.shape)
        return found

    def count_step(self) -> bool:
        """Count an optimizer step; return whether the basis' turn has come, and begin to count anew."""
        self.num_steps += 1
        due = self.is_due
        if due:
            self.num_steps.zero_()
        return due

    @property
    def is_due(self) -> bool:
        return int(self.num_steps) >= self.spec.rule.every  # over it, where a checkpoint was made under a longer period

    @property
    def version(self) -> int:
        """Changes whenever the basis does."""
        return self._num_recoded + (0 if self._stored is None else version_of(self._stored))

    @torch.no_grad()
    def replace(self, new: torch.Tensor) -> None:
        """Take over a basis [n, r] (or a code) that lies in the middle of a step, and note the overlap."""
        old, before = self.basis.detach().clone(), self.version
        if self._stored is not None:
            self._stored.copy_(new)
        else:
            self.code, self._num_recoded = new, self._num_recoded + 1
        present = self.basis.detach()
        overlap = old.mT @ present
        if torch.equal(old, present):  # exactly I, which states are not multiplied by: as in a resumed run
            overlap = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        self.note_move(before, overlap)
        self.drift = (1 - overlap.square().sum() / self.shape[1]).clamp_min(0).sqrt()
        self.overlap = overlap if self.overlap is None else self.overlap @ overlap
        self.num_updates += 1

    @torch.no_grad()
    def recode(self, code: torch.Tensor) -> None:
        """Take over a code between steps."""
        old, before = self.basis, self.version
        self.code, self._num_recoded = code, self._num_recoded + 1
        self.note_move(before, old.mT @ self.basis)
        self.num_updates += 1

    @torch.no_grad()
    def load(self, basis_or_code: torch.Tensor, num_updates: int, num_steps: int = 0) -> None:
        """Take over a basis, or a coded rule's code, from a checkpoint, in place."""
        if self._stored is not None:
            self._stored.copy_(basis_or_code)
        else:
            self.code, self._num_recoded = basis_or_code.to("cpu", copy=True), self._num_recoded + 1
        self.num_updates.fill_(num_updates)
        self.num_steps.fill_(num_steps)
        self.overlap = None
        self.drop_statistic()


def _first_count(spec: SubspaceSpec) -> int:
    from oasis_fx.runtime.subspaces.rules import BatchRule, DrawnRule

    if isinstance(spec.rule, DrawnRule):
        return 0
    return spec.rule.every if isinstance(spec.rule, BatchRule) else spec.rule.every - 1


def initial_basis(n: int, r: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """A random orthonormal n x r matrix: a function of its arguments only, so the same on every run and rank."""
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + n) * 1_000_003 + r)
    gaussian = torch.randn(n, r, dtype=torch.float64, generator=generator, device="cpu")
    return torch.linalg.qr(gaussian).Q.to(device=device, dtype=dtype).contiguous()
