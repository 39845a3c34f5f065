"""Tails: t columns T [n, t] beside a basis Q [n, r], new ones at each optimizer step, that no state follows.

    T = orth((I - Q Q^T) Z),   Z [n, t] of independent normal numbers

Factors of gradients have coordinates for both, ``dW [Q, T]`` [m, r + t]; moments, and the statistic that moves the
basis, for Q alone. Whatever of a gradient lies outside of Q is seen by some tail sooner or later:
``E[T T^T] = t / (n - r) (I - Q Q^T)``.

Z is the same for all bases of one n, whose complements differ. It is drawn on the device of the basis from a seed that
depends on the number of draws alone, so all ranks draw the same, and so does a resumed run.
"""

from __future__ import annotations

import torch

from oasis_fx._torch.precision import whole_float32_products
from oasis_fx.runtime.subspaces.orthonormalize import cholesky_orthonormalize
from oasis_fx.runtime.subspaces.seeds import generator_of


def first_tail(basis: torch.Tensor, t: int, count: int) -> torch.Tensor:
    """Return a tail [n, t] for one basis [n, r] by Householder QR, which completes any basis.

    Args:
        basis: orthonormal, float32 or float64.
        t: from 1 to n - r.
        count: the number of tails that were drawn before.
    """
    outside = torch.cat([basis, _normal(basis, t, count)], dim=1)
    with whole_float32_products(basis.device.type):
        return torch.linalg.qr(outside).Q[:, basis.shape[1] :].contiguous()


def new_tails(bases: torch.Tensor, t: int, count: int) -> torch.Tensor:
    """Return tails [L, n, t] for bases [L, n, r]. The host reads nothing.

    One that could not be orthonormalised is zero, so that factors have zeros for it and nothing is stepped along it.

    Args:
        bases: orthonormal, float32 or float64.
        t, count: as for `first_tail`.
    """
    z = _normal(bases, t, count).expand(len(bases), -1, -1)
    with whole_float32_products(bases.device.type):
        # Rounding leaves something of Q in what is not of length 1 yet: "twice is enough".
        (found,) = cholesky_orthonormalize([_outside(bases, _outside(bases, z))])
        if 2 * t > bases.shape[1] - bases.shape[2]:  # nearly square, and so of a bad condition
            (found,) = cholesky_orthonormalize([_outside(bases, found.q)])
        return torch.where(found.done.view(-1, 1, 1), _outside(bases, found.q), 0.0)


def _outside(bases: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the parts of columns [L, n, t] that are orthogonal to the bases."""
    return torch.baddbmm(columns, bases, torch.bmm(bases.mT, columns), alpha=-1)


def _normal(like: torch.Tensor, t: int, count: int) -> torch.Tensor:
    n = like.shape[-2]
    generator = generator_of(count, n, t, device=like.device)
    return torch.randn(n, t, dtype=like.dtype, device=like.device, generator=generator)
