"""The gradient of a rewritten weight: a tensor of the weight's shape that stores coordinates in a basis."""

from __future__ import annotations

from typing import Any

import torch

from oasis_fx._torch.callers import asked_by_compiler, called_by_engine
from oasis_fx._torch.tensors import make_wrapper
from oasis_fx.graph.matricization import LINEAR, Features
from oasis_fx.runtime.gradients.cell import Cell
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.state import SubspaceState
from oasis_fx.runtime.subspaces.subspace import Subspace


class LowRankGradWarning(UserWarning):
    """An operation made a full-size matrix of a low-rank gradient: the result is right, but no memory is saved."""


class LowRankGrad(torch.Tensor):
    """``G @ Q.T``, laid out as the weight is stored, and itself stored as G.

    It behaves as the dense gradient does, by one of three ways (`oasis_fx.runtime.gradients.operators`):

    - Norms, scaling, clipping, unscaling, accumulation, zeroing, copying and detaching work on the factor. Norms are
      exact, since Q is orthonormal or else ``Q^T Q`` is taken into account.
    - Other operations that only read the gradient are given a temporary full-size matrix, with one warning.
    - An operation that writes into the gradient, gives out a view of it, or might do either without saying so (custom
      operators, collectives, ``.numpy()``) turns it dense for all of its aliases: ``basis`` is None from then on and
      ``factor`` has the weight's shape. An optimizer of ours projects it again.

    An operation that would change the shape or the storage of the gradient raises.

    The class has no ``__tensor_flatten__``: with it in ``.grad``, recompiles crash on torch up to 2.13.

    Args:
        factor: G [m, r] in the weight's dtype, taken over without a copy; m counts the rows of all experts. With a tail
            of t columns it is [m, r + t], and the gradient ``G [Q, T]^T``.
        subspace: whose basis Q [n, r], or frame [Q, T], the factor is in.
        like: the weight, for shape and strides (autograd copies a gradient whose strides differ).
        features: which dimensions of the weight are n, see `oasis_fx.graph.matricization`.
    """

    cell: Cell
    # Results of operations are plain tensors: torch's default would cast them to this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, factor: torch.Tensor, subspace: Subspace, like: torch.Tensor, *, features: Features = LINEAR
    ) -> LowRankGrad:
        return wrap(Cell(factor, subspace, features, subspace.version), like.shape, like.stride())

    def __init__(self, *_: Any, **__: Any) -> None: ...  # `__new__` has made it

    @property
    def factor(self) -> torch.Tensor:
        """G [m, r], [m, r + t] with a tail; or the whole gradient in the weight's shape once it has turned dense."""
        return self.cell.values

    @property
    def subspace(self) -> Subspace:
        """Whose basis the factor is in, or was in before the gradient turned dense."""
        return self.cell.subspace

    @property
    def features(self) -> Features:
        """Which dimensions of the weight are n."""
        return self.cell.features

    @property
    def basis_version(self) -> int:
        """The version of the basis when the factor was computed."""
        return self.cell.version

    @property
    def basis(self) -> torch.Tensor | None:
        """Q [n, r], [Q, T] [n, r + t] with a tail; or None once the gradient has turned dense."""
        return None if self.cell.is_dense else self.subspace.frame

    @property
    def is_low_rank(self) -> bool:
        """False once the gradient has turned dense."""
        return not self.cell.is_dense

    @property
    def is_stale(self) -> bool:
        """True once the basis has moved since the backward pass; reading the gradient raises then."""
        return self.cell.is_stale

    def to_dense(self) -> torch.Tensor:  # type: ignore[override]
        """Return the gradient as a plain tensor of the weight's shape; this gradient stays what it is.

        Raises:
            StaleGradientError: the basis has moved since the backward pass, so that the factor has no meaning.
        """
        return self.cell.matrix(self.shape, self.dtype)

    def become_dense(self) -> torch.Tensor:
        """Turn this gradient and all of its aliases dense, and return the matrix that they share from now on.

        Raises:
            StaleGradientError: as `to_dense`.
        """
        if not self.cell.is_dense:
            dense = self.to_dense()
            if dense.stride() != self.stride():
                laid_out = torch.empty_strided(self.shape, self.stride(), dtype=dense.dtype, device=dense.device)
                dense = laid_out.copy_(dense)
            self.cell.values, self.cell.is_dense = dense, True
        return self.cell.values

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = "dense" if self.cell.is_dense else f"rank={self.factor.shape[1]}"
        return f"LowRankGrad(shape={tuple(self.shape)}, {kind}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRankGrad:
        return self.with_values(self.factor.clone())  # of the same subspace, which belongs to the weight

    def __reduce_ex__(self, protocol: Any) -> Any:
        subspace = self.subspace
        self.cell.check()
        entries = {key: value for key, value in subspace.entries().items() if value is not None}
        known = (subspace.spec, entries, subspace.shape, subspace.dtype)
        return _unpickled, (self.factor, *known, self.shape, self.stride(), self.features, self.cell.is_dense)

    def with_values(self, values: torch.Tensor) -> LowRankGrad:
        """Return a gradient in the same coordinates with other values, in a cell of its own."""
        return wrap(self.cell.with_values(values), self.shape, self.stride())

    def alias(self) -> LowRankGrad:
        """Return another tensor that shares the cell of this one."""
        return wrap(self.cell, self.shape, self.stride())

    # What torch does in C++ with the memory of a tensor, without an operator that could be intercepted. Each hands out
    # memory that may be written to, so the gradient lies there from now on.

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """An alias of this gradient. A tensor that is assigned to it becomes the gradient, and other aliases stay."""
        return self.alias()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        """Make another tensor the values of this gradient; other aliases keep theirs.

        Raises:
            ValueError: the tensor has another shape, dtype or device, and is no low-rank gradient of this shape.
        """
        if isinstance(new, LowRankGrad) and new.shape == self.shape:  # as of `model.to(dtype)`
            torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]  # dtype and device
            self.cell = new.cell
            return
        if new.shape != self.shape or new.dtype != self.dtype or new.device != self.device:
            raise ValueError(
                f"gradient.data is set to a tensor of shape {tuple(new.shape)}, {new.dtype}, on {new.device}: it must "
                f"have shape {tuple(self.shape)}, {self.dtype}, on {self.device}. Assign to weight.grad instead"
            )
        self.cell = self.cell.with_values(new.detach())
        self.cell.is_dense, self.cell.is_mixed = True, False

    def numpy(self, *, force: bool = False) -> Any:
        """Return an array as torch does: it shares the memory of the gradient, which turns dense."""
        return self.become_dense().numpy(force=force)

    def tolist(self) -> Any:
        """Return the numbers of the whole gradient as nested lists."""
        return self.to_dense().tolist()

    def data_ptr(self) -> int:
        """Return the address of the matrix that the gradient turns into."""
        if asked_by_compiler():
            return super().data_ptr()
        return self.become_dense().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage of the matrix that the gradient turns into."""
        if asked_by_compiler():
            return super().untyped_storage()
        return self.become_dense().untyped_storage()

    def storage(self) -> Any:
        """Return the typed storage of the matrix that the gradient turns into."""
        return self.become_dense().storage()  # type: ignore[no-untyped-call]

    def _typed_storage(self) -> Any:
        return self.become_dense()._typed_storage()  # type: ignore[no-untyped-call]

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.become_dense().__dlpack__(*args, **kwargs)

    @property
    def __cuda_array_interface__(self) -> Any:
        return self.become_dense().__cuda_array_interface__

    def apply_(self, function: Any) -> LowRankGrad:  # type: ignore[override]
        """Apply a function to each number in place, as torch does; the gradient turns dense."""
        self.become_dense().apply_(function)
        return self

    def map_(self, tensor: torch.Tensor, function: Any) -> LowRankGrad:  # type: ignore[override]
        """Apply a function to each pair of numbers in place, as torch does; the gradient turns dense."""
        self.become_dense().map_(tensor.to_dense() if isinstance(tensor, LowRankGrad) else tensor, function)
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is _DETACH:  # by which AccumulateGrad takes a gradient that nobody else has: no need for another one
            return args[0] if called_by_engine() else args[0].alias()
        from oasis_fx.runtime.gradients.operators import run  # it imports this module

        return run(func, args, kwargs or {})


_DETACH = torch.ops.aten.detach.default


def wrap(cell: Cell, shape: torch.Size, strides: tuple[int, ...]) -> LowRankGrad:
    """Return a gradient of a shape and strides with a cell that it may share with others."""
    form = cell.values.dtype, torch.strided, cell.values.device
    made: LowRankGrad = make_wrapper(LowRankGrad, shape, strides, None, None, *form)
    made.cell = cell
    return made


def _unpickled(
    factor: torch.Tensor,
    spec: SubspaceSpec,
    entries: dict[str, Any],
    basis_shape: tuple[int, int],
    basis_dtype: torch.dtype,
    shape: Any,
    stride: Any,
    features: Features,
    dense: bool,
) -> LowRankGrad:
    subspace = Subspace(spec, SubspaceState.from_entries(entries, basis_shape, basis_dtype, factor.device))
    cell = Cell(factor, subspace, features, subspace.version)
    cell.is_dense = dense
    return wrap(cell, shape, stride)


def _rebuild(
    factor: torch.Tensor, basis: torch.Tensor, code: torch.Tensor | None, spec: SubspaceSpec, *rest: Any
) -> LowRankGrad:
    """Make the gradient that a pickle of 0.2 holds; this function goes with the old names of modules."""
    entries = {"basis": basis} if code is None else {"basis_code": code}
    return _unpickled(factor, spec, entries, (basis.shape[0], basis.shape[1]), basis.dtype, *rest)
