"""What each operator does to a low-rank gradient.

An operator with a handler below works on the factor G [m, r], or on the whole gradient once that has turned dense. A
handler that cannot do so with the arguments at hand returns NotImplemented. Such a call, and every operator without a
handler, is given matrices (`oasis_fx.runtime.gradients.at_full_size`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from oasis_fx.runtime.gradients.at_full_size import MADE_A_MATRIX, TURNED_DENSE, run_at_full_size, warn_once
from oasis_fx.runtime.gradients.collectives import COLLECTIVES
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad

aten = torch.ops.aten


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator of which some argument is a low-rank gradient.

    Raises:
        RuntimeError: the operator would change the gradient's shape or storage, is one of FSDP2's, or unscales a
            gradient whose subspace keeps error feedback.
        StaleGradientError: the operator needs the gradient's values, and the basis has moved since the backward pass.
    """
    handler = _HANDLERS.get(func)
    result = NotImplemented if handler is None else handler(func, *args, **kwargs)
    return run_at_full_size(func, args, kwargs) if result is NotImplemented else result


_HANDLERS: dict[Any, Callable[..., Any]] = dict(COLLECTIVES)


def _handles(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for func in funcs:
            assert func not in _HANDLERS
            _HANDLERS[func] = handler
        return handler

    return register


def _is_scalar(value: object) -> bool:
    """Return whether a value can scale a factor: a number, or a tensor of one element and at most two dimensions."""
    if isinstance(value, LowRankGrad):
        return False
    return not isinstance(value, torch.Tensor) or (value.numel() == 1 and value.dim() <= 2)


def _factors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the factor G [m, r] of each low-rank gradient in a list, and every other tensor as it is."""
    return [t.factor if isinstance(t, LowRankGrad) else t for t in tensors]


def _isometric(gradient: torch.Tensor) -> torch.Tensor:
    """Return a matrix with the Frobenius norm of a gradient that makes no matrix of its size.

    It is the factor G [m, r] in the gradient's dtype where Q is orthonormal. Elsewhere it is G L in the dtype of Q,
    with the Cholesky factor L [r, r] of ``Q^T Q``: ``||G L|| = ||G Q^T||``. A dense gradient is returned as it is.

    Raises:
        StaleGradientError: Q is not orthonormal, or gradients in different bases were added up, and the basis has
            moved since the backward pass.
    """
    if not isinstance(gradient, LowRankGrad) or not gradient.is_low_rank:
        return gradient.factor if isinstance(gradient, LowRankGrad) else gradient
    if gradient.subspace.spec.rule.orthonormal and not gradient.cell.is_mixed:
        return gradient.factor  # of a basis that has moved since, too
    gradient.cell.check()
    basis = gradient.subspace.basis.detach()
    return gradient.factor.to(basis.dtype) @ torch.linalg.cholesky(basis.mT @ basis)


# `LowRankGrad` itself answers detach, by which AccumulateGrad takes each gradient over, in the same way.
@_handles(aten.alias.default)
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
        warn_once(func, self, TURNED_DENSE)
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
    feeding_back = next((t for t in tensors if isinstance(t, LowRankGrad) and t.subspace.error is not None), None)
    if feeding_back is not None:
        raise RuntimeError(
            f"error feedback of {feeding_back.subspace.spoken_name} does not go with a scaled loss: the error that it "
            "keeps is in the units of its own step's scale. Train in bfloat16, or without error_feedback"
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

    def matrix(given: Any) -> Any:
        if not isinstance(given, LowRankGrad):
            return given
        warn_once(func, given, MADE_A_MATRIX)
        return given.to_dense()

    dense_args, dense_kwargs = tree_map(matrix, (args, kwargs))
    return func(*dense_args, **dense_kwargs)
