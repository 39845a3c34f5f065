"""Tails are orthonormal to their bases, new at each step, and together see all that the basis leaves out."""

from __future__ import annotations

import pytest
import torch

from oasis_fx.runtime.subspaces import tails
from oasis_fx.runtime.subspaces.basis_updates import move_due_bases
from oasis_fx.runtime.subspaces.initial import initial_basis, new_subspace
from oasis_fx.runtime.subspaces.rules import Oja
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.subspace import Subspace
from oasis_fx.runtime.subspaces.tail_updates import draw_tails


def subspace(n: int = 12, r: int = 3, t: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> Subspace:
    spec = SubspaceSpec(r, Oja(), tail=t)
    return new_subspace(initial_basis(n, r, dtype, torch.device("cpu"), seed), spec)


def assert_orthonormal(found: Subspace) -> None:
    frame = found.frame.detach().double()
    eye = torch.eye(found.num_columns, dtype=torch.float64)
    torch.testing.assert_close(frame.T @ frame, eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "r", "t"), [(64, 8, 8), (64, 1, 1), (64, 16, 48), (96, 4, 91), (5, 4, 1)])
def test_a_tail_is_orthonormal_and_outside_of_its_basis(dtype, n, r, t) -> None:
    batch = [subspace(n, r, t, dtype, seed) for seed in range(3)]
    for one in batch:
        assert_orthonormal(one)
    for _ in range(20):
        before = [one.tail.clone() for one in batch]
        for one in batch:
            one.statistic = torch.randn(n, r, dtype=dtype)
        move_due_bases(batch)
        for one, old in zip(batch, before, strict=True):
            assert_orthonormal(one)
            assert n - r == 1 or not torch.equal(one.tail, old)  # of one direction there is nothing to choose


def test_tails_are_drawn_when_the_basis_does_not_move() -> None:
    spec = SubspaceSpec(3, Oja(every=10), tail=2)
    one = new_subspace(initial_basis(12, 3, torch.float64, torch.device("cpu")), spec)
    seen = []
    for _ in range(3):
        one.statistic = torch.randn(12, 3, dtype=torch.float64)
        move_due_bases([one])
        seen.append(one.tail.clone())
    assert int(one.num_updates) == 1 and int(one.num_tails) == 3
    assert not torch.equal(seen[1], seen[2])


def test_on_average_they_see_all_that_the_basis_leaves_out() -> None:
    """E[T T^T] = t / (n - r) (I - Q Q^T)."""
    basis = initial_basis(10, 3, torch.float64, torch.device("cpu"))
    draws = 4000
    total = torch.zeros(10, 10, dtype=torch.float64)
    for count in range(draws):
        (drawn,) = tails.new_tails(basis[None], 2, count)
        total += drawn @ drawn.T
    outside = torch.eye(10, dtype=torch.float64) - basis @ basis.T
    torch.testing.assert_close(total / draws, 2 / 7 * outside, rtol=0, atol=0.02)


def test_the_number_of_draws_alone_decides_what_is_drawn() -> None:
    """So all ranks draw the same, whatever else their generators did; the batch does not matter either."""
    one, other, third = subspace(), subspace(), subspace(seed=1)
    torch.manual_seed(1)
    draw_tails([third, one])
    torch.manual_seed(2)
    draw_tails([other])
    torch.testing.assert_close(one.tail, other.tail, rtol=0, atol=1e-12)
    draw_tails([other])
    assert not torch.allclose(one.tail, other.tail)


def test_a_closed_gate_changes_no_tail() -> None:
    one = subspace()
    before = one.tail.clone()
    draw_tails([one], torch.tensor(False))
    assert torch.equal(one.tail, before)
    draw_tails([one], torch.tensor(True))
    assert not torch.equal(one.tail, before)


def test_the_overlap_of_a_step_is_that_of_the_bases() -> None:
    one = subspace()
    version, old = one.version, one.basis.detach().clone()
    one.statistic = torch.randn(12, 3, dtype=torch.float64)
    move_due_bases([one])
    torch.testing.assert_close(one.overlap_since(version), old.T @ one.basis.detach())
    version = one.version
    draw_tails([one])
    torch.testing.assert_close(one.overlap_since(version), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("t", [-1])
def test_a_negative_tail_is_refused(t) -> None:
    with pytest.raises(ValueError, match="tail is -1: it must be a whole number from 0"):
        SubspaceSpec(3, Oja(), tail=t)


def test_a_tail_that_cannot_be_orthonormalised_is_zero(monkeypatch) -> None:
    monkeypatch.setattr(tails, "_normal", lambda like, t, count: torch.ones(like.shape[-2], t, dtype=like.dtype))
    one = subspace()
    one.tail.fill_(1.0)
    draw_tails([one])
    assert not one.tail.any()
