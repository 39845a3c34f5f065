"""Moves of bases at their edges: several before a step, from a random start, of defective matrices; and what counts."""

from __future__ import annotations

import math

import pytest
import torch

from oasis_fx.runtime.optim.updates import all_finite
from oasis_fx.runtime.subspaces import orthonormalize as module
from oasis_fx.runtime.subspaces.basis_updates import move_due_bases
from oasis_fx.runtime.subspaces.initial import initial_basis, new_subspace
from oasis_fx.runtime.subspaces.orthonormalize import orthonormalize
from oasis_fx.runtime.subspaces.rules import Oja
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.subspace import Subspace


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
        move_due_bases([moving])
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


@pytest.mark.parametrize("low", ["high", "medium", "newer interface"])
def test_products_are_whole_where_the_process_wants_fast_ones(monkeypatch, low) -> None:
    """TF32 and bfloat16 products show on few machines: what is looked at here are the settings during the products."""

    def precisions() -> list[str]:
        return [torch._C._get_fp32_precision_getter(name, "matmul") for name in ("cuda", "mkldnn")]

    seen, real = [], module._cholesky_qr
    monkeypatch.setattr(module, "_cholesky_qr", lambda *a, **k: seen.append(precisions()) or real(*a, **k))
    torch.set_float32_matmul_precision("highest")
    try:
        if low == "newer interface":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(low)
        before = precisions()
        assert "tf32" in before
        assert orthonormalize(torch.randn(2, 9, 3)).dtype == torch.float32
        assert precisions() == before
        if low != "newer interface":
            assert torch.get_float32_matmul_precision() == low
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
    assert seen and all(set(each) <= {"ieee", "none"} for each in seen)


def test_a_basis_that_cannot_be_orthonormalised_stays_is_counted_and_recovers(monkeypatch) -> None:
    """Beside others of its batch, which move. The next statistic moves it as if nothing had been."""

    class Flat(Oja):
        def step(self, basis, statistic, energy, rate):
            return torch.where(
                statistic[..., :1, :1] < 0, torch.ones_like(basis), super().step(basis, statistic, energy, rate)
            )

    bad, good, twin = subspace(rule=Flat()), subspace(seed=1, rule=Flat()), subspace(rule=Flat())
    c = torch.randn(9, 3, dtype=torch.float64).abs()
    before = bad.basis.clone()
    bad.statistic, good.statistic = -c, c.clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "qr", None)  # nothing calls it in a step
        overlaps = move_due_bases([bad, good])
    assert torch.equal(bad.basis, before) and not torch.equal(good.basis, before)
    assert torch.equal(overlaps[bad], torch.eye(3, dtype=torch.float64))
    assert [int(s.num_updates) for s in (bad, good)] == [0, 1] and [int(s.num_stuck) for s in (bad, good)] == [1, 0]
    for each in (bad, twin):
        each.statistic = c.clone()
        move_due_bases([each])
    assert torch.equal(bad.basis, twin.basis) and not torch.equal(bad.basis, before)


def test_bases_of_several_shapes_are_orthonormalised_as_each_alone() -> None:
    """Their small factors are computed together."""
    together = [subspace(9, seed=1), subspace(12, seed=2), subspace(9, seed=3)]
    alone = [subspace(9, seed=1), subspace(12, seed=2), subspace(9, seed=3)]
    for one, other in zip(together, alone, strict=True):
        one.statistic = torch.randn(one.shape, dtype=torch.float64)
        other.statistic = one.statistic.clone()
    move_due_bases(together)
    for one, other in zip(together, alone, strict=True):
        move_due_bases([other])
        assert torch.equal(one.basis, other.basis)
        assert float(one.measure("condition")) == float(other.measure("condition"))


def test_a_large_float16_gradient_is_finite() -> None:
    """Each entry is, and their norm is over 65504, the largest of float16."""
    fine = torch.full((64, 64), 3e4, dtype=torch.float16)
    assert bool(all_finite([fine]))
    for bad in (math.inf, -math.inf, math.nan):
        spoilt = fine.clone()
        spoilt[3, 3] = bad
        assert not bool(all_finite([torch.zeros(2), spoilt]))
