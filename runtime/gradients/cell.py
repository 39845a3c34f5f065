"""What the aliases of one gradient share: a factor in a basis or, after a write that no factor can hold, a matrix.

``.detach()``, ``.data`` and whatever autograd hands on are aliases of a gradient; a write through any of them is seen
by all. A cell knows which basis its factor is in, and refuses to be read once that basis has moved.
"""

from __future__ import annotations

import torch

from oasis_fx.graph.matricization import Features, from_rows
from oasis_fx.runtime.subspaces.subspace import Subspace


class StaleGradientError(RuntimeError):
    """A gradient was used after its basis had moved."""


class Cell:
    """The value of a gradient.

    Attributes:
        values: G in the coordinates of the subspace's frame: [m, r], or [m, r + t] with a tail of t columns; or the
            whole gradient in the weight's shape.
        subspace: whose basis Q [n, r], or frame [Q, T], the factor is in.
        features: which dimensions of the weight are n, see `oasis_fx.graph.matricization`.
        version: of the basis when the factor was computed.
        is_dense: whether ``values`` is the whole gradient.
        is_mixed: whether gradients of different moments of the basis were added up, so that nothing can be read.
    """

    __slots__ = ("features", "is_dense", "is_mixed", "subspace", "values", "version")

    def __init__(self, values: torch.Tensor, subspace: Subspace, features: Features, version: int) -> None:
        self.values, self.subspace, self.features, self.version = values, subspace, features, version
        self.is_dense = self.is_mixed = False

    def with_values(self, values: torch.Tensor) -> Cell:
        """Return another cell in the same coordinates, with other values."""
        other = Cell(values, self.subspace, self.features, self.version)
        other.is_dense, other.is_mixed = self.is_dense, self.is_mixed
        return other

    def take_over(self, other: Cell) -> None:
        """Take over the coordinates of another cell, but not its values, which the caller copies."""
        self.subspace, self.features, self.version = other.subspace, other.features, other.version
        self.is_dense, self.is_mixed = other.is_dense, other.is_mixed

    @property
    def is_stale(self) -> bool:
        """Whether the basis has moved since the factor was computed."""
        return not self.is_dense and (self.is_mixed or self.version != self.subspace.version)

    def is_alongside(self, other: Cell) -> bool:
        """Return whether two cells are in the coordinates of one subspace, be it at different moments."""
        return not (self.is_dense or other.is_dense) and (
            self.subspace is other.subspace and self.features == other.features
        )

    def has_coordinates_of(self, other: Cell) -> bool:
        """Return whether the values of two cells can be added."""
        if self.is_dense and other.is_dense:
            return True
        return self.is_alongside(other) and self.version == other.version and not (self.is_mixed or other.is_mixed)

    def clear(self) -> None:
        """Set the gradient to zero, which is zero in any basis: a stale gradient is valid again."""
        self.values.zero_()
        self.version, self.is_mixed = self.subspace.version, False

    def check(self) -> None:
        """Raise where the gradient can no longer be read.

        Raises:
            StaleGradientError: the basis has moved since the backward pass.
        """
        if self.is_stale:
            raise StaleGradientError(
                f"the basis of the gradient of {self.subspace.spoken_name} has moved since the backward pass that "
                "computed it: read gradients before optimizer.step(), and call zero_grad() before the next backward()"
            )

    def matrix(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return the whole gradient in the weight's shape: the values themselves where they are dense, else G Q^T.

        With a tail it is ``G [Q, T]^T``, the projection of the gradient on all columns.
        """
        if self.is_dense:
            return self.values
        self.check()
        frame = self.subspace.frame.detach().to(self.values.device)
        factor = self.values.to(frame.dtype)  # Q is float32 where the weight is bfloat16
        return from_rows(factor @ frame.T, shape, self.features).to(dtype)

    def current_factor(self) -> torch.Tensor:
        """Return G in the present coordinates of the subspace.

        A gradient that was computed one move ago is projected on the present basis, as a dense gradient would be:
        ``G Q^T Q+``. So an optimizer that steps twice on one gradient steps on the same one. Of a tail that is gone it
        keeps nothing: its coordinates in the present tail are zero.

        Raises:
            StaleGradientError: the basis has moved more than once.
        """
        if not self.is_stale:
            return self.values
        overlap = None if self.is_mixed else self.subspace.overlap_since(self.version)
        if overlap is None:
            self.check()
        assert overlap is not None
        tracked = self.values[:, : len(overlap)].to(overlap.dtype) @ overlap.to(self.values.device)
        missing = self.values.shape[1] - tracked.shape[1]
        return torch.nn.functional.pad(tracked, (0, missing)).to(self.values.dtype)
