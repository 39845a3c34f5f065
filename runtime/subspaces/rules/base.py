"""What a rule is: how a subspace gets its basis, and how the basis moves.

A rule derives from one of three classes, by what the basis is computed from:

    StatisticRule   C = A^T A Q, summed over the backward passes of a step; the basis moves at the step's end
    BatchRule       A itself, handed over while the graph runs; the basis moves first and projects the same batch
    DrawnRule       nothing: the basis is made from a few numbers

A is the activation X [N, n] that a group of layers reads (``on = "activation"``: the backward pass keeps ``X Q``), or
the gradient dW [m, n] of one weight (``on = "gradient"``: X is kept, dW lives inside the backward graph, ``dW Q``
leaves it).

A rule is a frozen dataclass: its fields are its settings, and part of a subspace's identity. docs/extending.md
adds one in a few lines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch

from oasis_fx.runtime.subspaces.rules.settings import check_settings, declare_defaults, refuse_unknown

if TYPE_CHECKING:
    from oasis_fx.runtime.subspaces.subspace import Subspace

Side = Literal["activation", "gradient"]


@dataclass(frozen=True)
class Rule:
    """What all rules have in common; a rule derives from one of the three classes below.

    Args:
        every: optimizer steps between two moves of a basis, from 1. Every class has a default of its own.

    Attributes:
        name: what `oasis_backend(subspace=...)` calls it.
        transports: whether optimizer states are transported to a basis that has moved (as in LDAdam), or kept as they
            are, in coordinates that now mean something else (as in GaLore).
        orthonormal: whether ``Q^T Q = I``.
        dense: whether the gradient leaves the graph at full size, ``(dY^T P) Q^T`` (``(dW Q) Q^T`` on gradients), to be
            stepped by any optimizer with states at full size. The basis moves as it would otherwise.
        coded: whether the basis is a function of a few numbers, ``expand(code)``, and not stored.
        draws: whether each subspace needs a seed, which comes from torch's generator as first weights do.

    Raises:
        ValueError: a setting is out of range, or one that the rule has no use for.
    """

    name: ClassVar[str]
    transports: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    coded: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    every: int = field(default=1, kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        """Make a default that the class gives, ``every: ClassVar[int] = 20`` too, the default of that setting."""
        super().__init_subclass__(**options)
        declare_defaults(cls)

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        if "__dataclass_fields__" not in vars(cls):  # a class without the decorator has settings too
            dataclass(frozen=True)(cls)
        refuse_unknown(cls, settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def resizable(self) -> bool:
        """Whether the subspace can go on from any orthonormal basis of any rank, so that its rank may change."""
        return self.orthonormal and not self.coded

    @property
    def on(self) -> Side:
        """What the rule projects: ``"activation"`` for X [N, n], ``"gradient"`` for dW [m, n]."""
        return "activation"

    def expand(self, code: torch.Tensor, n: int, r: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Make the basis [n, r] of a ``coded`` rule from its code.

        Args:
            code: int64 on the CPU, as `first_code` and later moves made it.
            n: rows of the basis.
            r: columns of the basis.
            dtype: of the result.
            device: of the result.

        Raises:
            NotImplementedError: the class is ``coded`` and does not define this.
        """
        raise NotImplementedError

    def first_code(self, r: int, seed: int) -> torch.Tensor:
        """Make the code that a subspace starts with, int64 on the CPU; ``seed`` is 0 for a rule that does not draw.

        Raises:
            NotImplementedError: the class is ``coded`` and does not define this.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class StatisticRule(Rule):
    """A rule that moves a basis by its statistic C, a batch of subspaces of one shape at once.

    Args:
        lr: the step size eta, a number over 0; ``math.inf`` is power iteration, and ``"auto"`` finds the step size
            during training (`oasis_fx.runtime.subspaces.step_size`).

    Attributes:
        needs_energy: whether graphs have to sum ||A||^2 for `step`, whatever ``stats`` of the backend says.
    """

    needs_energy: ClassVar[bool] = False

    lr: float | Literal["auto"] = field(default=1.0, kw_only=True)

    def step(
        self, basis: torch.Tensor, statistic: torch.Tensor, energy: torch.Tensor, rate: torch.Tensor
    ) -> torch.Tensor:
        """Compute the matrices of which the new bases are the orthonormal parts.

        Args:
            basis: Q [L, n, r].
            statistic: C [L, n, r], divided by its largest entry.
            energy: ||A||^2 [L, 1, 1] in the same units; NaN where graphs do not sum it (``needs_energy`` makes them).
            rate: the step size [L, 1, 1]; `POWER_STEP` at the first move of a basis, from its random start.

        Returns:
            [L, n, r]; it is orthonormalised with a positive diagonal.

        Raises:
            NotImplementedError: the class does not define this.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class BatchRule(Rule):
    """A rule that chooses a basis from the batch itself. It runs within the compiled graph, as an opaque operator.

    Attributes:
        uses_momentum: whether `choose` is to find the first moment of an optimizer in the subspace.
        each_batch: whether every batch gets a basis of its own, which nothing outlives. Its gradients have to be
            ``dense``, since nothing would be left to read a factor by, and the rule does not take ``every``.
    """

    uses_momentum: ClassVar[bool] = False
    each_batch: ClassVar[bool] = False

    def choose(self, batch: torch.Tensor, subspace: Subspace, generator: torch.Generator) -> torch.Tensor:
        """Choose the new basis [n, r], or its code where the rule is ``coded``.

        Args:
            batch: A [N or m, n], finite and not all zeros, in the dtype of the basis; not to be changed. N may be
                smaller than r. Where the rule is ``each_batch`` it may be anything, without rows too.
            subspace: with its present basis, ``num_updates``, and ``momentum`` where the rule ``uses_momentum``.
            generator: on the CPU, for whatever is random; a function of the subspace and its ``num_updates``.

        Raises:
            NotImplementedError: the class does not define this.
        """
        raise NotImplementedError

    def weights(self, n: int, r: int) -> torch.Tensor | None:
        """Return the factors [r] of the columns in the projection ``A Q diag(weights)``, or None where all are 1.

        They must be positive; where the rule is ``dense``, they may be 0 too.
        """
        return None

    def project_gradient(self, gradient: torch.Tensor, subspace: Subspace, old: torch.Tensor | None) -> torch.Tensor:
        """Project a gradient dW [m, n] on the basis: the factor [m, r]. ``old`` is the basis before a move just now."""
        return gradient @ subspace.basis.detach()


@dataclass(frozen=True)
class DrawnRule(Rule):
    """A rule that looks at no data. Its basis is drawn anew at each ``every``-th optimizer step."""

    coded: ClassVar[bool] = True

    def next_code(self, code: torch.Tensor) -> torch.Tensor:
        """Make the code of the next basis from that of the present one, int64 on the CPU.

        Raises:
            NotImplementedError: the class does not define this.
        """
        raise NotImplementedError
