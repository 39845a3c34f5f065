"""How a stored weight is a matrix of rows (out_features) by features (in_features).

A matmul contracts some dimensions of the weight with its activation: the features. They are given as ``start`` and
``stop``, the rest are rows: (1, 2) of nn.Linear's [m, n]; (0, 1) of Conv1D's [n, m]; (1, 4) of a convolution's
[m, channels, height, width]; (2, 3) of experts stored [experts, m, n] and (1, 2) of [experts, n, m].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Features = tuple[int, int]
LINEAR: Features = (1, 2)


def num_features(shape: Sequence[int], features: Features) -> int:
    """Return n, the number of features: the product of the sizes of the dimensions that are features."""
    return math.prod(shape[features[0] : features[1]])


def num_rows(shape: Sequence[int], features: Features) -> int:
    """Return m, the number of rows of the low-rank gradient, those of all experts together."""
    return math.prod(shape[: features[0]]) * math.prod(shape[features[1] :])


def smaller_side(shape: Sequence[int], features: Features) -> Features:
    """Return the features of a weight, or its rows in their place where these are fewer and stand side by side."""
    start, stop = features
    others = (0, start) if stop == len(shape) else (stop, len(shape)) if start == 0 else features
    return others if num_features(shape, others) < num_features(shape, features) else features


def row_dims(num_dims: int, features: Features) -> list[int]:
    """Return the dimensions of a weight that are rows, in order."""
    start, stop = features
    return [*range(start), *range(stop, num_dims)]


def rows_first(num_dims: int, features: Features) -> list[int]:
    """Return the permutation of a weight's dimensions that puts its rows in front of its features."""
    return [*row_dims(num_dims, features), *range(*features)]


def stored_order(num_dims: int, features: Features) -> list[int]:
    """Return the permutation that takes dimensions in the order of `rows_first` back to that of the stored weight."""
    order = rows_first(num_dims, features)
    return sorted(range(num_dims), key=order.__getitem__)


def as_rows(tensor: torch.Tensor, features: Features) -> torch.Tensor:
    """Return a tensor of the weight's shape as [m, n]; it is a view where strides allow one."""
    n = num_features(tensor.shape, features)
    return tensor.permute(rows_first(tensor.dim(), features)).reshape(num_rows(tensor.shape, features), n)


def from_rows(rows: torch.Tensor, shape: Sequence[int], features: Features) -> torch.Tensor:
    """Return a matrix [m, n] as a tensor of the weight's shape."""
    sizes = [shape[dim] for dim in rows_first(len(shape), features)]
    return rows.view(sizes).permute(stored_order(len(shape), features))


def add_product_(
    weight: torch.Tensor, u: torch.Tensor, basis: torch.Tensor, features: Features, *, beta: float, alpha: float
) -> None:
    """Compute ``weight = beta weight + alpha U Q^T`` in place, for U [m, r] and Q [n, r]."""
    rows = rows_view(weight, features)
    if rows is not None:
        rows.addmm_(u, basis.T, beta=beta, alpha=alpha)
        return
    target = weight.permute(rows_first(weight.dim(), features))
    if target.dim() == 3:
        right = basis.T.expand(target.shape[0], -1, -1)
        target.baddbmm_(u.view(*target.shape[:2], -1), right, beta=beta, alpha=alpha)
    else:
        weight.mul_(beta).add_(from_rows(u @ basis.T, weight.shape, features), alpha=alpha)


def rows_view(weight: torch.Tensor, features: Features) -> torch.Tensor | None:
    """Return the weight as a view [m, n], itself where it is stored as one; None where strides do not allow one.

    They do not for experts stored [experts, n, m], nor for convolutions with channels last.
    """
    if weight.dim() == 2 and features == LINEAR:
        return weight
    try:
        return weight.permute(rows_first(weight.dim(), features)).view(-1, num_features(weight.shape, features))
    except RuntimeError:
        return None
