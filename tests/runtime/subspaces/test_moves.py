"""Moves of bases at their edges: several before a step, from a random start, of defective matrices; and what counts."""

from __future__ import annotations

import math

import torch

from oasis_fx.runtime.optim.updates import all_finite
from oasis_fx.runtime.subspaces import orthonormalize as module
from oasis_fx.runtime.subspaces.basis_updates import move_bases
from oasis_fx.runtime.subspaces.orthonormalize import orthonormalize
from oasis_fx.runtime.subspaces.rules import Oja
from oasis_fx.runtime.subspaces.subspace import Subspace, SubspaceSpec, initial_basis, new_subspace


def subspace(n: int = 9, r: int = 3, seed: int = 0, **spec) -> Subspace:
    return new_subspace(initial_basis(n, r, torch.float64, torch.device("cpu"), seed), SubspaceSpec(r, **spec))


def test_two_moves_before_a_step_are_one_overlap() -> None:
    """The product of the overlaps of both moves, in their order: matrices do not commute."""
    moving = subspace(rule="pca")
    bases = [moving.basis.detach().clone(), *(subspace(seed=seed).basis.detach() for seed in (1, 2))]
    for basis in bases[1:]:
        moving.replace(basis)
    first, second = bases[0].T @ bases[1], bases[1].T @ bases[2]
    torch.testing.assert_close(moving.overlap, first @ second)
    assert not torch.allclose(first @ second, second @ first, rtol=1e-2)
    assert not torch.allclose(first @ second, second, rtol=1e-2)
    assert int(moving.num_updates) == 2


def test_the_automatic_rate_does_not_learn_from_the_first_move() -> None:
    """Two equal moves raise the rate; the move from the random start is neither of them."""
    moving = subspace(rule=Oja(lr="auto"))
    rates = []
    for step in range(4):
        c = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step % 2))
        moving.statistic = c
        move_bases([moving])
        rates.append(math.exp(float(moving.log_rate)))
        assert (moving.last_move is not None and bool(moving.last_move.any())) == (step > 0)
    assert rates[0] == rates[1] == 1.0  # the second move is the first that is remembered: there is no other beside it
    assert rates[2] != 1.0


def test_what_householder_does_has_a_positive_diagonal() -> None:
    """A member that Cholesky-QR cannot do. Of positive columns LAPACK makes a negative first entry of R."""
    a = torch.rand(2, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    a[0, :, 3] = a[0, :, 2]  # rank-deficient
    q = orthonormalize(a)
    assert bool(((q.mT @ a).diagonal(dim1=-2, dim2=-1) > -1e-12).all())
    upper = torch.linalg.qr(a).R.diagonal(dim1=-2, dim2=-1)
    assert bool((upper[0] < -1e-3).any())  # there was a sign to be changed
    torch.testing.assert_close(q.mT @ q, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


def test_products_are_in_float64_where_float32_ones_are_not_whole(monkeypatch) -> None:
    """TF32 and bfloat16 products show on few machines: what is looked at here is the dtype of the work."""
    seen, real = [], module._cholesky_qr
    monkeypatch.setattr(module, "_cholesky_qr", lambda a: seen.append(a.dtype) or real(a))
    for precision, dtype in (("highest", torch.float32), ("high", torch.float64), ("medium", torch.float64)):
        seen.clear()
        torch.set_float32_matmul_precision(precision)
        try:
            assert orthonormalize(torch.randn(2, 9, 3)).dtype == torch.float32
        finally:
            torch.set_float32_matmul_precision("highest")
        assert set(seen) == {dtype}, precision


def test_a_large_float16_gradient_is_finite() -> None:
    """Each entry is, and their norm is over 65504, the largest of float16."""
    fine = torch.full((64, 64), 3e4, dtype=torch.float16)
    assert bool(all_finite([fine]))
    for bad in (math.inf, -math.inf, math.nan):
        spoilt = fine.clone()
        spoilt[3, 3] = bad
        assert not bool(all_finite([torch.zeros(2), spoilt]))
