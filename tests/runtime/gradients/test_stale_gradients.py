"""A gradient whose basis has moved may lie there; who reads it, or steps on it too late, is told."""

from __future__ import annotations

import pytest
import torch

from oasis_fx.runtime.gradients.cell import StaleGradientError
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.optim.adamw import OasisAdamW
from oasis_fx.runtime.optim.sgd import OasisSGD
from oasis_fx.runtime.subspaces.basis_updates import move_due_bases
from oasis_fx.runtime.subspaces.rules import Random
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

pytestmark = pytest.mark.filterwarnings("ignore::oasis_fx.LowRankGradWarning")
SPEC, FULL = SubspaceSpec(3), SubspaceSpec(8)


def inputs(step: int) -> torch.Tensor:
    return torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def stale_gradient(make_weight, spec=SPEC) -> tuple[LowRankGrad, torch.Tensor]:
    """One whose basis has moved since, and what it was before."""
    weight = make_weight(5, 8)
    subspace = STORE.resolve([weight], spec, [(1, 2)])
    factor = torch.randn(5, spec.rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient = LowRankGrad(factor, subspace, weight)
    before = gradient.to_dense()
    subspace.statistic = torch.randn(8, spec.rank, dtype=torch.float64)
    for _ in range(2):
        move_due_bases([subspace])
        subspace.statistic = torch.randn(8, spec.rank, dtype=torch.float64)
    return gradient, before


READS = [
    lambda g: g.to_dense(),
    lambda g: g + 1,
    lambda g: g[0],
    lambda g: g.norm(1),
    lambda g: g.numpy(),
    lambda g: g.tolist(),
    lambda g: g.clamp_(-1, 1),
    lambda g: torch.zeros(5, 8, dtype=torch.float64).add_(g),
    lambda g: g.clone().to_dense(),
    lambda g: (2 * g).to_dense(),
    lambda g: g.detach().view(-1),
]


@pytest.mark.parametrize("read", READS)
def test_reading_one_raises(read, make_weight) -> None:
    gradient, _ = stale_gradient(make_weight)
    with pytest.raises(StaleGradientError, match=r"has moved since .* call zero_grad\(\)"):
        read(gradient)


def test_its_norm_is_known_where_the_basis_is_orthonormal(make_weight) -> None:
    gradient, before = stale_gradient(make_weight)
    torch.testing.assert_close(gradient.norm(), before.norm())


def test_its_norm_is_not_known_where_the_basis_is_not(make_weight) -> None:
    gradient, _ = stale_gradient(make_weight, SubspaceSpec(3, rule=Random(every=1)))
    with pytest.raises(StaleGradientError):
        gradient.norm()


def test_adding_to_one_is_no_error_until_the_sum_is_used(make_weight) -> None:
    gradient, _ = stale_gradient(make_weight)
    fresh = LowRankGrad(torch.ones_like(gradient.factor), gradient.subspace, torch.empty(5, 8))
    for addend in (fresh, torch.ones(5, 8, dtype=torch.float64)):
        gradient.add_(addend)
        for use in (lambda: gradient.to_dense(), lambda: gradient.norm()):
            with pytest.raises(StaleGradientError):
                use()
    gradient.zero_()  # zero is zero in any basis
    gradient.add_(fresh)
    torch.testing.assert_close(gradient.to_dense(), fresh.to_dense())


def test_a_stale_addend_is_refused(make_weight) -> None:
    gradient, _ = stale_gradient(make_weight)
    fresh = LowRankGrad(torch.ones_like(gradient.factor), gradient.subspace, torch.empty(5, 8))
    with pytest.raises(StaleGradientError):
        torch.ones(5, 8, dtype=torch.float64).add_(gradient)
    with pytest.raises(StaleGradientError):
        fresh + gradient


def test_copying_over_one_makes_it_valid(make_weight) -> None:
    gradient, _ = stale_gradient(make_weight)
    dense = torch.randn(5, 8, dtype=torch.float64)
    gradient.copy_(dense)
    torch.testing.assert_close(gradient.to_dense(), dense)


@pytest.mark.parametrize("spec", [SPEC, FULL])
def test_a_second_step_without_a_backward_pass_steps_on_the_same_gradient(spec, products, make_weight) -> None:
    w, reference = make_weight(5, 8), make_weight(5, 8)
    ours, theirs = OasisSGD([w], lr=0.1), torch.optim.SGD([reference], lr=0.1, momentum=0.9)
    (y,) = products(inputs(0), [w], spec)
    y.square().sum().backward()
    ours.step()
    basis = STORE.existing(w, spec).basis.clone()
    (2 * (inputs(0) @ reference.T).square().sum() / 2).backward()
    gradient = w.grad.factor.clone()
    ours.step()
    assert torch.equal(STORE.existing(w, spec).basis, basis)  # nothing is known that could move it once more
    if spec is FULL:
        theirs.step(), theirs.step()
        torch.testing.assert_close(w, reference)
    else:
        overlap = STORE.existing(w, spec).latest_move.overlap
        torch.testing.assert_close(ours.state[w]["momentum_buffer"], 1.9 * gradient @ overlap)
    ours.step()  # nor does a third


def test_a_step_after_more_moves_is_refused_and_changes_nothing(products, make_weight) -> None:
    w, held = make_weight(5, 8), None
    optimizer = OasisAdamW([w], lr=0.1)
    for step in range(3):
        (y,) = products(inputs(step), [w], SPEC)
        y.sum().backward()
        held = w.grad if held is None else held
        optimizer.step()
        w.grad = None
    w.grad, before = held, w.detach().clone()
    with pytest.raises(StaleGradientError, match=r"call zero_grad\(\)"):
        optimizer.step()
    assert torch.equal(w, before)


def test_generator_and_discriminator(products, make_weight) -> None:
    """The usual loop: the generator's backward pass adds to the discriminator's gradients, which are zeroed later."""
    g, d = make_weight(8, 8, seed=1), make_weight(5, 8, seed=2)
    reference_g, reference_d = (torch.nn.Parameter(p.detach().clone()) for p in (g, d))
    ours = [OasisSGD([p], lr=0.01) for p in (g, d)]
    theirs = [torch.optim.SGD([p], lr=0.01, momentum=0.9) for p in (reference_g, reference_d)]
    for step in range(4):
        for (wg, wd), (opt_g, opt_d), layer in (
            ((g, d), ours, lambda x, w: products(x, [w], FULL)[0]),
            ((reference_g, reference_d), theirs, lambda x, w: x @ w.T),
        ):
            opt_d.zero_grad()
            fake = layer(inputs(step), wg)
            (layer(fake.detach(), wd).square().mean() + layer(inputs(step + 50), wd).mean()).backward()
            opt_d.step()
            opt_g.zero_grad()
            layer(fake, wd).mean().backward()  # adds to d's gradient, whose basis has just moved
            opt_g.step()
    torch.testing.assert_close(g, reference_g)
    torch.testing.assert_close(d, reference_d)


def test_weights_that_share_a_basis_may_be_in_two_optimizers_that_step_in_turn(products, make_weight) -> None:
    ours = [make_weight(5, 8, seed=1), make_weight(5, 8, seed=2)]
    theirs = [torch.nn.Parameter(w.detach().clone()) for w in ours]
    own, stock = ([OasisSGD([w], lr=0.02) for w in ours], [torch.optim.SGD([w], lr=0.02, momentum=0.9) for w in theirs])
    for step in range(4):
        for y in products(inputs(step), ours, FULL):
            y.square().sum().backward(retain_graph=True)
        for w in theirs:
            (inputs(step) @ w.T).square().sum().backward()
        for optimizer in (*own, *stock):
            optimizer.step(), optimizer.zero_grad()
    for w, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(w, reference)


def test_an_optimizer_that_rests_while_another_moves_its_basis_is_refused(products, make_weight) -> None:
    q, k = make_weight(5, 8, seed=1), make_weight(5, 8, seed=2)
    one, other = OasisAdamW([q], lr=0.1), OasisAdamW([k], lr=0.1)
    for step in range(4):
        for y in products(inputs(step), [q, k], SPEC):
            y.sum().backward(retain_graph=True)
        one.step(), one.zero_grad()
        if step == 0:
            other.step()
        if step < 3:
            other.zero_grad()
    with pytest.raises(RuntimeError, match="one optimizer"):
        other.step()
