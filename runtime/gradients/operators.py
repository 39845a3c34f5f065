"""What each operator does to a low-rank gradient.

An operator with a handler below works on the factor. Every other one is given matrices:

    it only reads the gradient               a temporary matrix; the gradient stays low-rank
    it writes into it, or makes a view       the matrix that the gradient turns into, for all of its aliases
    it might do so without declaring it      the same: operators outside of aten, collectives among them
    it changes the gradient's shape          an error
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from oasis_fx.errors import warn_user
from oasis_fx.runtime.gradients.collectives import COLLECTIVES, warn_of_bases_apart
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad, LowRankGradWarning

aten = torch.ops.aten


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator of which some argument is a low-rank gradient."""
    handler = _HANDLERS.get(func)
    result = NotImplemented if handler is None else handler(func, *args, **kwargs)
    return _run_on_matrices(func, args, kwargs) if result is NotImplemented else result


# Operators without a handler


def _run_on_matrices(func: Any, args: Any, kwargs: Any) -> Any:
    if func.namespace == "fsdp":
        raise RuntimeError(
            "FSDP2 cannot shard low-rank gradients: call oasis_fx.distributed.prepare(model) after fully_shard"
        )
    if torch.Tag.inplace_view in func.tags or func in _RESIZES:
        raise RuntimeError(
            f"{func} would change the shape or the storage of a low-rank gradient, which is not supported: assign "
            "what you need to weight.grad, made from weight.grad.to_dense()"
        )
    warn_of_bases_apart(func, args, kwargs)
    written = _may_be_written(func)
    turned: dict[int, LowRankGrad] = {}  # by the identity of the matrix

    def matrix(name: str) -> Callable[[Any], Any]:
        def of(given: Any) -> Any:
            if not isinstance(given, LowRankGrad):
                return given
            if name not in written:
                warn_once(str(func), "a low-rank gradient was made a full-size matrix")
                return given.to_dense()
            if given.is_low_rank:
                warn_once(str(func), "a low-rank gradient turned dense")
            dense = given.become_dense()
            turned[id(dense)] = given
            return dense

        return of

    names = [argument.name for argument in func._schema.arguments]
    dense_args = [tree_map(matrix(name), given) for name, given in zip(names, args, strict=False)]
    dense_kwargs = {name: tree_map(matrix(name), given) for name, given in kwargs.items()}
    result = func(*dense_args, **dense_kwargs)
    # An operator in place returns what it was given.
    return tree_map(lambda value: turned.get(id(value), value) if isinstance(value, torch.Tensor) else value, result)


# Operators that change a tensor's metadata but have no tag that says so in every supported version of torch.
_RESIZES = {aten.resize_.default, aten.resize_as_.default, aten.set_.source_Tensor, aten.set_.source_Storage}


def _may_be_written(func: Any) -> set[str]:
    """Names of the arguments whose memory the operator may write to, or give out."""
    arguments = func._schema.arguments
    if func.namespace not in ("aten", "prims"):
        return {argument.name for argument in arguments}  # collectives write without declaring it
    return {argument.name for argument in arguments if argument.alias_info is not None}


_warned: set[str] = set()


def warn_once(operation: str, what: str) -> None:
    """Warn, once for each operation, that a result is right and saves nothing."""
    if operation not in _warned:
        _warned.add(operation)
        warn_user(f"{operation}: {what}; the result is right, but no memory is saved", LowRankGradWarning)


# Operators that work on the factor

_HANDLERS: dict[Any, Callable[..., Any]] = dict(COLLECTIVES)


def _handles(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for func in funcs:
            assert func not in _HANDLERS
            _HANDLERS[func] = handler
        return handler

    return register


def _is_scalar(value: object) -> bool:
    """Whether a factor can be scaled by it: a number, or a tensor of one element that broadcasts against a factor."""
    if isinstance(value, LowRankGrad):
        return False
    return not isinstance(value, torch.Tensor) or (value.numel() == 1 and value.dim() <= 2)


def _factors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t.factor if isinstance(t, LowRankGrad) else t for t in tensors]


def _isometric(gradient: torch.Tensor) -> torch.Tensor:
    """A matrix with the norm of a gradient: its factor, times L with ``L L^T = Q^T Q`` where Q is not orthonormal."""
    if not isinstance(gradient, LowRankGrad) or not gradient.is_low_rank:
        return gradient.factor if isinstance(gradient, LowRankGrad) else gradient
    if gradient.subspace.spec.rule.orthonormal and not gradient.cell.is_mixed:
        return gradient.factor  # of a basis that has moved since, too
    gradient.cell.check()
    basis = gradient.subspace.basis.detach()
    return gradient.factor.to(basis.dtype) @ torch.linalg.cholesky(basis.mT @ basis)


# AccumulateGrad takes a gradient over by detach; both share the memory.
@_handles(aten.detach.default, aten.alias.default)
def _alias(func: Any, self: LowRankGrad) -> Any:
    return self.alias()


# .clone(), .to() and changes of dtype.
@_handles(aten.clone.default, aten._to_copy.default)
def _map_factor(func: Any, self: LowRankGrad, **kwargs: Any) -> Any:
    if not self.is_low_rank:
        return func(self.factor, **kwargs)  # a copy of a matrix is a matrix
    kwargs.pop("memory_format", None)
    return self.with_values(func(self.factor, **kwargs))


# AccumulateGrad's copy where a gradient cannot be taken over: an empty one, then copy_.
@_handles(aten.new_empty_strided.default)
def _new_empty_strided(func: Any, self: LowRankGrad, size: Any, stride: Any, **kwargs: Any) -> Any:
    if tuple(size) != tuple(self.shape) or not self.is_low_rank:
        return func(self.factor, size, stride, **kwargs)
    return self.with_values(torch.empty_like(self.factor, dtype=kwargs.get("dtype"), device=kwargs.get("device")))


@_handles(aten.copy_.default)
def _copy(func: Any, self: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(self, LowRankGrad):
        return NotImplemented
    if isinstance(source, LowRankGrad) and source.is_low_rank and source.factor.shape == self.factor.shape:
        self.factor.copy_(source.factor, non_blocking)
        self.cell.take_over(source.cell)
        return self
    if self.is_low_rank:  # what it was does not matter, nor whether it could be read
        warn_once(str(func), "a low-rank gradient turned dense")
        self.cell.values = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
        self.cell.is_dense = True
    self.factor.copy_(source.to_dense() if isinstance(source, LowRankGrad) else source, non_blocking)
    return self


# Two uses of a weight in one backward pass add out of place; accumulation over passes adds in place.
@_handles(aten.add.Tensor)
def _add(func: Any, self: Any, other: Any, *, alpha: Any = 1) -> Any:
    if isinstance(self, LowRankGrad) and isinstance(other, LowRankGrad) and self.shape == other.shape:
        if self.cell.has_coordinates_of(other.cell):
            total = func(self.factor, other.factor, alpha=alpha)
            return self.with_values(total) if self.is_low_rank else total
    return NotImplemented


@_handles(aten.add_.Tensor)
def _add_in_place(func: Any, self: Any, other: Any, *, alpha: Any = 1) -> Any:
    if not isinstance(self, LowRankGrad) or getattr(other, "shape", None) != self.shape:
        return NotImplemented
    if isinstance(other, LowRankGrad) and self.cell.has_coordinates_of(other.cell):
        func(self.factor, other.factor, alpha=alpha)
        return self
    if self.cell.is_stale:
        # Nobody may ever read this gradient, as that of a discriminator in its generator's step. Who does is told.
        self.cell.is_mixed = True
        return self
    if isinstance(other, LowRankGrad) and other.is_stale:
        other.cell.check()
    # Another use of the weight, outside of the compiled graph or in another basis: exact, at full size.
    return NotImplemented


# Loss scaling and clipping, one gradient at a time.
@_handles(aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
def _scale(func: Any, self: Any, other: Any) -> Any:
    if isinstance(other, LowRankGrad) and _is_scalar(self) and func is aten.mul.Tensor:
        self, other = other, self
    if not isinstance(self, LowRankGrad) or not _is_scalar(other):
        return NotImplemented
    scaled = func(self.factor, other)
    return self.with_values(scaled) if self.is_low_rank else scaled


@_handles(aten.neg.default)
def _negate(func: Any, self: LowRankGrad) -> Any:
    return self.with_values(func(self.factor)) if self.is_low_rank else func(self.factor)


@_handles(aten.mul_.Tensor, aten.div_.Tensor, aten.mul_.Scalar, aten.div_.Scalar)
def _scale_in_place(func: Any, self: Any, other: Any) -> Any:
    if not isinstance(self, LowRankGrad) or not _is_scalar(other):
        return NotImplemented
    func(self.factor, other)
    return self


@_handles(aten.neg_.default)
def _negate_in_place(func: Any, self: LowRankGrad) -> Any:
    func(self.factor)
    return self


# zero_grad(set_to_none=False).
@_handles(aten.zero_.default)
def _zero(func: Any, self: LowRankGrad) -> Any:
    self.cell.clear()
    return self


@_handles(aten._foreach_zero_.default)
def _foreach_zero(func: Any, tensors: Sequence[torch.Tensor]) -> None:
    func(_factors(tensors))
    for tensor in tensors:
        if isinstance(tensor, LowRankGrad):
            tensor.cell.version, tensor.cell.is_mixed = tensor.subspace.version, False


# clip_grad_norm_, and gradient.norm().
@_handles(aten.linalg_vector_norm.default)
def _vector_norm(
    func: Any, self: Any, order: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if order != 2 or dim is not None or keepdim:
        return NotImplemented
    return func(_isometric(self), order, dim, keepdim, dtype=dtype)


@_handles(aten._foreach_norm.Scalar)
def _foreach_norm(func: Any, tensors: Sequence[torch.Tensor], order: Any = 2, dtype: Any = None) -> Any:
    return func([_isometric(t) for t in tensors], order, dtype) if order == 2 else NotImplemented


@_handles(aten._foreach_mul_.Scalar, aten._foreach_mul_.Tensor, aten._foreach_div_.Scalar, aten._foreach_div_.Tensor)
def _foreach_scale(func: Any, tensors: Sequence[torch.Tensor], scalar: Any) -> Any:
    return func(_factors(tensors), scalar) if _is_scalar(scalar) else NotImplemented


@_handles(aten._foreach_mul_.ScalarList, aten._foreach_div_.ScalarList)
def _foreach_scale_each(func: Any, tensors: Sequence[torch.Tensor], scalars: Sequence[float]) -> Any:
    return func(_factors(tensors), scalars)


# GradScaler.unscale_.
@_handles(aten._amp_foreach_non_finite_check_and_unscale_.default)
def _unscale(func: Any, tensors: Sequence[torch.Tensor], found_inf: torch.Tensor, inverse_scale: torch.Tensor) -> None:
    if any(isinstance(t, LowRankGrad) and t.subspace.error is not None for t in tensors):
        raise RuntimeError(
            "error feedback does not go with a scaled loss: what it keeps is in the units of the scale of its step. "
            "Train in bfloat16, or without error_feedback"
        )
    func(_factors(tensors), found_inf, inverse_scale)


# torch's fused optimizers say that they write to gradients; they do so only where they unscale them.
@_handles(
    *(
        getattr(getattr(aten, name), overload)
        for name in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_")
        for overload in ("default", "tensor_lr")
        if hasattr(getattr(aten, name, None), overload)
    )
)
def _fused_optimizer(func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("grad_scale") is not None:
        return NotImplemented
    warn_once(str(func), "a low-rank gradient was made a full-size matrix")
    dense = tree_map(lambda given: given.to_dense() if isinstance(given, LowRankGrad) else given, (args, kwargs))
    return func(*dense[0], **dense[1])
