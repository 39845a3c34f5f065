"""Operators that cannot work on the factor of a low-rank gradient.

What such an operator is given depends on what it declares to do with the gradient:

    it only reads it                       a temporary matrix; the gradient stays low-rank
    it writes into it, or makes a view     the matrix that the gradient turns into, for all of its aliases
    it might do so without declaring it    the same: operators outside of aten, collectives among them
    it changes its shape or its storage    an error
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from oasis_fx.errors import warn_user
from oasis_fx.runtime.gradients.collectives import warn_of_bases_apart
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad, LowRankGradWarning

aten = torch.ops.aten

# What a warning says of the gradient.
MADE_A_MATRIX = "was made a full-size matrix"
TURNED_DENSE = "turned dense"


def run_at_full_size(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the matrices that its low-rank gradients stand for, in the weights' shapes and dtypes.

    Where it writes into one, or gives out a view, the gradient turns dense and its aliases see the write.

    Raises:
        RuntimeError: the operator is one of FSDP2's, or would change a gradient's shape or storage.
        StaleGradientError: the basis of a gradient has moved since the backward pass that computed it.
    """
    if func.namespace == "fsdp":
        raise RuntimeError(
            f"FSDP2 cannot shard the low-rank gradient of {_names(args, kwargs)}: call "
            "oasis_fx.distributed.prepare(model) after fully_shard"
        )
    if torch.Tag.inplace_view in func.tags or func in _RESIZES:
        raise RuntimeError(
            f"{func} would change the shape or the storage of the low-rank gradient of {_names(args, kwargs)}, which "
            "is not supported: assign what you need to weight.grad, made from weight.grad.to_dense()"
        )
    warn_of_bases_apart(func, args, kwargs)
    written = _may_be_written(func)
    turned: dict[int, LowRankGrad] = {}  # by the identity of the matrix

    def matrix(name: str) -> Callable[[Any], Any]:
        def of(given: Any) -> Any:
            if not isinstance(given, LowRankGrad):
                return given
            if name not in written:
                warn_once(func, given, MADE_A_MATRIX)
                return given.to_dense()
            if given.is_low_rank:
                warn_once(func, given, TURNED_DENSE)
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


def _names(args: Any, kwargs: Any) -> str:
    """Return the names of the weights whose low-rank gradients are among an operator's arguments."""
    gradients = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LowRankGrad)]
    return "; ".join(dict.fromkeys(gradient.subspace.spoken_name for gradient in gradients))


def _may_be_written(func: Any) -> set[str]:
    """Return the names of the arguments whose memory an operator may write into, or may give out as a view."""
    arguments = func._schema.arguments
    if func.namespace not in ("aten", "prims"):
        return {argument.name for argument in arguments}  # collectives write without declaring it
    return {argument.name for argument in arguments if argument.alias_info is not None}


_warned: set[str] = set()


def warn_once(func: Any, gradient: LowRankGrad, what: str) -> None:
    """Warn, once for each operator, that its result is right and saves nothing."""
    operation = str(func)
    if operation not in _warned:
        _warned.add(operation)
        warn_user(
            f"{operation}: the low-rank gradient of {gradient.subspace.spoken_name} {what}; the result is right, but "
            "no memory is saved. Work on weight.grad.factor instead, or call weight.grad.to_dense() if you mean it",
            LowRankGradWarning,
        )
