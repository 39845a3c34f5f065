"""The subspace of one activation: its orthonormal basis, and the rule by which the basis moves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

RULES = ("oja",)


@dataclass(frozen=True)
class SubspaceSpec:
    """What a subspace is asked to be.

    Attributes:
        rank: columns of the basis, from 1.
        rule: how the basis moves; one of `RULES`.
        learning_rate: step of the rule, over 0; `math.inf` is power iteration.
        every: the basis moves at each so many optimizer steps, from 1.

    Raises:
        ValueError: naming the value and what is allowed.
    """

    rank: int
    rule: str = "oja"
    learning_rate: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}: it must be a whole number from 1")
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}: it must be one of {', '.join(map(repr, RULES))}")
        if math.isnan(self.learning_rate) or not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate!r}: it must be a number over 0")
        if self.every < 1:
            raise ValueError(f"every is {self.every!r}: it must be a whole number from 1")


class Subspace:
    """The basis Q [n, r] that the weights which read one activation share.

    Attributes:
        basis: leaf tensor [n, r], float32 (float64 for float64 weights), orthonormal columns. Allocated once
            and changed in place only, so that CUDA graphs may keep its address.
        spec: what was asked for; its rank is the basis' number of columns.
        energy: leaf scalar that graphs take and do not read; its gradient is ||X||^2, summed like the statistic.
        num_updates: int64 scalar on the basis' device: how often the basis has moved.
        num_steps: int64 scalar on the CPU: optimizer steps since the basis last had its turn to move (``spec.every``).
        captured_energy, drift, condition: scalars of the last move, on the basis' device; NaN before. What they are:
            `oasis_fx.stats.SubspaceStats`.
    """

    def __init__(
        self, basis: torch.Tensor, spec: SubspaceSpec, num_updates: int = 0, num_steps: int | None = None
    ) -> None:
        self.basis = basis.detach().contiguous().requires_grad_()
        self.spec = spec
        self.energy = torch.zeros((), dtype=basis.dtype, device=basis.device, requires_grad=True)
        self.num_updates = torch.tensor(num_updates, device=basis.device)
        # A new basis is random: its turn is the first step, not the k-th.
        self.num_steps = torch.tensor(spec.every - 1 if num_steps is None else num_steps, device="cpu")
        unknown = torch.full((), torch.nan, dtype=basis.dtype, device=basis.device)
        self.captured_energy = self.drift = self.condition = unknown

    def __repr__(self) -> str:
        n, r = self.basis.shape
        return f"Subspace(n={n}, rank={r}, rule={self.spec.rule!r}, dtype={self.basis.dtype})"

    @property
    def statistic(self) -> torch.Tensor | None:
        """C [n, r] = X^T X Q, summed over the backward passes of this step; None before the first."""
        return self.basis.grad

    def drop_statistic(self) -> None:
        self.basis.grad = self.energy.grad = None

    def count_step(self) -> bool:
        """Count an optimizer step; return whether the basis moves in it."""
        self.num_steps += 1
        due = int(self.num_steps) >= self.spec.every  # over it, where a checkpoint was made under a longer period
        if due:
            self.num_steps.zero_()
        return due

    @property
    def version(self) -> int:
        """Changes whenever the basis does."""
        return self.basis._version

    @torch.no_grad()
    def load(self, basis: torch.Tensor, num_updates: int, num_steps: int = 0) -> None:
        """Take over a basis from a checkpoint, in place."""
        self.basis.copy_(basis)
        self.num_updates.fill_(num_updates)
        self.num_steps.fill_(num_steps)
        self.drop_statistic()


def initial_basis(n: int, r: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """A random orthonormal n x r matrix: a function of its arguments only, so the same on every run and rank."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + n) * 1_000_003 + r)
    gaussian = torch.randn(n, r, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(gaussian).Q.to(device=device, dtype=dtype).contiguous()
