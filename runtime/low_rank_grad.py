"""The gradient of a rewritten weight: a tensor of the weight's shape that stores coordinates in a basis."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from oasis_fx.runtime.layout import LINEAR, Features, from_rows
from oasis_fx.runtime.subspace import Subspace

aten = torch.ops.aten


class LowRankGradWarning(UserWarning):
    """An operation made a full-size matrix of a low-rank gradient: right, without the saving."""


class LowRankGrad(torch.Tensor):
    """``G @ Q.T``, laid out as the weight is stored, and itself stored as G.

    Norms, scaling, clipping, unscaling, accumulation and zeroing work on the factor; norms are exact, since Q
    is orthonormal or else Q^T Q is reckoned with. Every other operation makes the full-size matrix, warns once, and
    is right; every other operation *in place* raises, since it would change a temporary. Where a dense gradient is
    added in place, as when a weight is used outside of the compiled graph too, the gradient turns dense: ``basis`` is
    None and ``factor`` has the weight's shape.

    No ``__tensor_flatten__``: with it in ``.grad``, recompiles crash on torch up to 2.13.

    Args:
        factor: G [m, r] in the weight's dtype, taken over without a copy; m counts the rows of all experts.
        subspace: whose basis Q [n, r] the factor is in.
        like: the weight, for shape and strides (autograd copies a gradient whose strides differ).
        features: which dimensions of the weight are n, see `oasis_fx.runtime.layout`.
    """

    factor: torch.Tensor
    subspace: Subspace
    features: Features
    basis_version: int
    _dense: bool

    # Results of operations are plain tensors: torch's default would cast them to this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, factor: torch.Tensor, subspace: Subspace, like: torch.Tensor, *, features: Features = LINEAR
    ) -> LowRankGrad:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, like.shape, strides=like.stride(), dtype=factor.dtype, device=factor.device
        )

    def __init__(
        self, factor: torch.Tensor, subspace: Subspace, like: torch.Tensor, *, features: Features = LINEAR
    ) -> None:
        self.factor = factor
        self.subspace = subspace
        self.features = features
        self.basis_version = subspace.version
        self._dense = False

    @property
    def transposed(self) -> bool:
        """True where the weight is stored n x m, as in Hugging Face's Conv1D."""
        return self.features[1] != self.dim()

    @property
    def basis(self) -> torch.Tensor | None:
        """Q [n, r], or None once the gradient has turned dense."""
        return None if self._dense else self.subspace.basis

    @property
    def is_low_rank(self) -> bool:
        """False once the gradient has turned dense."""
        return not self._dense

    def to_dense(self) -> torch.Tensor:  # type: ignore[override]
        """The gradient as a plain tensor of the weight's shape.

        Raises:
            RuntimeError: the basis has moved since the backward pass, so the factor means nothing any more.
        """
        if self._dense:
            return self.factor
        if self.basis_version != self.subspace.version:
            raise RuntimeError(
                "the basis of this gradient has moved since the backward pass that made it: read gradients "
                "before optimizer.step(), and call zero_grad() before the next backward()"
            )
        basis = self.subspace.basis.detach().to(self.factor.device)
        factor = self.factor.to(basis.dtype)  # Q is float32 where the weight is bfloat16
        return from_rows(factor @ basis.T, self.shape, self.features).to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = "dense" if self._dense else f"rank={self.factor.shape[1]}"
        return f"LowRankGrad(shape={tuple(self.shape)}, {kind}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRankGrad:
        return self._with(self.factor.clone())  # of the same subspace: it belongs to the weight, not to the gradient

    def __reduce_ex__(self, protocol: Any) -> Any:
        subspace = self.subspace
        state = (self.factor, subspace.basis.detach(), subspace.code, subspace.spec, self.shape, self.stride())
        return _rebuild, (*state, self.features, self._dense)

    def _with(self, factor: torch.Tensor) -> LowRankGrad:
        """The same gradient with another factor of equal coordinates."""
        like = torch.empty_strided(self.shape, self.stride(), device="meta", dtype=factor.dtype)
        other = LowRankGrad(factor, self.subspace, like, features=self.features)
        other.basis_version, other._dense = self.basis_version, self._dense
        return other

    def _become_dense(self, dense: torch.Tensor, operation: str) -> None:
        _warn(operation, "a low-rank gradient turned dense")
        self.factor, self._dense = dense, True

    def _same_coordinates(self, other: object) -> bool:
        if not isinstance(other, LowRankGrad) or self._dense != other._dense or self.shape != other.shape:
            return False
        return self._dense or (self.subspace is other.subspace and self.basis_version == other.basis_version)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        result = NotImplemented if handler is None else handler(func, *args, **kwargs)
        return _densify_and_run(func, args, kwargs) if result is NotImplemented else result


def _rebuild(
    factor: torch.Tensor,
    basis: torch.Tensor,
    code: torch.Tensor | None,
    spec: Any,
    shape: Any,
    stride: Any,
    features: Features,
    dense: bool,
) -> LowRankGrad:
    like = torch.empty_strided(shape, stride, device="meta")
    gradient = LowRankGrad(factor, Subspace(basis, spec, code=code), like, features=features)
    gradient._dense = dense
    return gradient


_warned: set[str] = set()


def _warn(operation: str, what: str) -> None:
    if operation not in _warned:
        _warned.add(operation)
        warnings.warn(f"{operation}: {what}; this is right but saves nothing", LowRankGradWarning, stacklevel=4)


def _densify_and_run(func: Any, args: Any, kwargs: Any) -> Any:
    if func.namespace == "fsdp":
        raise RuntimeError(
            "FSDP2 cannot shard low-rank gradients: call oasis_fx.distributed.synchronize(model) after fully_shard"
        )
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and any(
            isinstance(v, LowRankGrad) for v in torch.utils._pytree.tree_leaves(given.get(argument.name))
        ):
            raise RuntimeError(
                f"{func} in place on a low-rank gradient is not supported: it would change a temporary full-size "
                "matrix and be lost. Use gradient.to_dense() and assign the result to .grad"
            )
    return _run_dense(func, args, kwargs)


def _run_dense(func: Any, args: Any, kwargs: Any) -> Any:
    _warn(str(func), "a low-rank gradient was made a full-size matrix")
    dense = torch.utils._pytree.tree_map(lambda v: v.to_dense() if isinstance(v, LowRankGrad) else v, (args, kwargs))
    return func(*dense[0], **dense[1])


_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _handles(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for func in funcs:
            assert func not in _HANDLERS
            _HANDLERS[func] = handler
        return handler

    return register


def _is_scalar(value: object) -> bool:
    return not isinstance(value, torch.Tensor) or value.dim() == 0


def _factors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t.factor if isinstance(t, LowRankGrad) else t for t in tensors]


def _isometric(gradient: torch.Tensor) -> torch.Tensor:
    """A matrix with the norm of a gradient: its factor, times L with ``L L^T = Q^T Q`` where Q is not orthonormal."""
    if not isinstance(gradient, LowRankGrad):
        return gradient
    if gradient._dense or gradient.subspace.spec.rule.orthonormal:
        return gradient.factor
    basis = gradient.subspace.basis.detach()
    return gradient.factor.to(basis.dtype) @ torch.linalg.cholesky(basis.mT @ basis)


# AccumulateGrad takes a gradient over by detach; clone and _to_copy serve .clone(), .to() and dtype changes.
@_handles(aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default)
def _map_factor(func: Any, self: LowRankGrad, **kwargs: Any) -> Any:
    if func is aten.clone.default:
        kwargs.pop("memory_format", None)
    return self._with(func(self.factor, **kwargs))


# AccumulateGrad's copy where a gradient cannot be taken over: an empty one, then copy_.
@_handles(aten.new_empty_strided.default)
def _new_empty_strided(func: Any, self: LowRankGrad, size: Any, stride: Any, **kwargs: Any) -> Any:
    if tuple(size) != tuple(self.shape):
        return func(self.factor, size, stride, **kwargs)
    return self._with(torch.empty_like(self.factor, dtype=kwargs.get("dtype"), device=kwargs.get("device")))


@_handles(aten.copy_.default)
def _copy(func: Any, self: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(self, LowRankGrad):
        return NotImplemented
    if isinstance(source, LowRankGrad) and not source._dense and source.factor.shape == self.factor.shape:
        self.factor.copy_(source.factor, non_blocking)
        self.subspace, self.basis_version, self._dense = source.subspace, source.basis_version, False
        return self
    dense = source.to_dense() if isinstance(source, LowRankGrad) else source
    self._become_dense(torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device), str(func))
    self.factor.copy_(dense)
    return self


# Two uses of a weight in one backward pass add out of place; accumulation over passes adds in place.
@_handles(aten.add.Tensor)
def _add(func: Any, self: Any, other: Any, *, alpha: Any = 1) -> Any:
    if isinstance(self, LowRankGrad) and self._same_coordinates(other):
        return self._with(func(self.factor, other.factor, alpha=alpha))
    return NotImplemented


@_handles(aten.add_.Tensor)
def _add_in_place(func: Any, self: Any, other: Any, *, alpha: Any = 1) -> Any:
    if not isinstance(self, LowRankGrad):
        return NotImplemented
    if self._same_coordinates(other):
        func(self.factor, other.factor, alpha=alpha)
        return self
    if not isinstance(other, torch.Tensor) or other.shape != self.shape:
        return NotImplemented
    # Another use of the weight, outside of the compiled graph or in another basis: exact, at full size.
    addend = other.to_dense() if isinstance(other, LowRankGrad) else other
    self._become_dense(torch.add(self.to_dense(), addend, alpha=alpha), str(func))
    return self


# Loss scaling and clipping, one gradient at a time.
@_handles(aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
def _scale(func: Any, self: Any, other: Any) -> Any:
    if isinstance(other, LowRankGrad) and _is_scalar(self) and func is aten.mul.Tensor:
        self, other = other, self
    if not isinstance(self, LowRankGrad) or not _is_scalar(other):
        return NotImplemented
    return self._with(func(self.factor, other))


@_handles(aten.mul_.Tensor, aten.div_.Tensor, aten.mul_.Scalar, aten.div_.Scalar)
def _scale_in_place(func: Any, self: Any, other: Any) -> Any:
    if not isinstance(self, LowRankGrad) or not _is_scalar(other):
        return NotImplemented
    func(self.factor, other)
    return self


# zero_grad(set_to_none=False). Zero is zero in any basis, so a gradient whose basis has moved is valid again.
@_handles(aten.zero_.default)
def _zero(func: Any, self: LowRankGrad) -> Any:
    func(self.factor)
    self.basis_version = self.subspace.version
    return self


@_handles(aten._foreach_zero_.default)
def _foreach_zero(func: Any, tensors: Sequence[torch.Tensor]) -> None:
    func(_factors(tensors))
    for tensor in tensors:
        if isinstance(tensor, LowRankGrad):
            tensor.basis_version = tensor.subspace.version


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
        for name in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_")
        for overload in ("default", "tensor_lr")
    )
)
def _fused_optimizer(func: Any, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs.get("grad_scale") is not None else _run_dense(func, args, kwargs)
