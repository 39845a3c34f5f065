"""What a graph is lent is looked up once for each set of weights, and again when anything about them has changed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from oasis_fx import LowRankGrad, oasis_backend
from oasis_fx.compile import lender
from oasis_fx.runtime.gradients import low_rank_grad
from oasis_fx.runtime.subspaces.store import STORE

from .small import EAGER, backward, batch, net


def loss(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(x @ first.t()) @ second).square().sum()


def weights(seed: int) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, dtype=torch.float64, generator=draw)) for s in ((6, 12), (6, 4))]


def assert_right(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    """Gradients are the dense ones, projected on the bases that the store has of the weights."""
    dense = torch.autograd.grad(loss(x, first, second), [first, second])
    for weight, expected in zip((first, second), dense, strict=True):
        (subspace,) = STORE.all_of(weight)
        assert isinstance(weight.grad, LowRankGrad) and weight.grad.subspace is subspace
        basis = subspace.basis.detach()
        rows = expected if weight is first else expected.T
        torch.testing.assert_close(weight.grad.factor, rows @ basis)


def test_it_is_looked_up_once(monkeypatch) -> None:
    looked_up = []
    found_by = STORE.resolve
    monkeypatch.setattr(STORE, "resolve", lambda *given: looked_up.append(given) or found_by(*given))
    compiled = torch.compile(loss, backend=oasis_backend(rank=3, **EAGER))
    x, one, other = batch(), weights(1), weights(2)
    for _ in range(2):  # what makes subspaces for others makes it look again
        compiled(x, *one), compiled(x, *other)
    looked_up.clear()
    for given in (one, other) * 3:
        for weight in given:
            weight.grad = None
        compiled(x, *given).backward()
        assert_right(x, *given)
    assert not looked_up


def test_a_subspace_that_was_put_in_the_place_of_another_is_found() -> None:
    model, backend = net(), oasis_backend(rank=3, **EAGER)
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        backward(compiled, batch())
    before = model[0].weight.grad.subspace
    STORE.forget(model[0].weight)
    model.zero_grad()
    backward(compiled, batch())
    assert model[0].weight.grad.subspace is not before
    assert STORE.all_of(model[0].weight) == (model[0].weight.grad.subspace,)


@pytest.mark.slow
def test_weights_come_and_go_through_one_graph() -> None:
    """Their addresses, by which the lender knows them, are used again."""

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ weight.t()).square().sum()

    backend, x, ids, bases = oasis_backend(rank=3, **EAGER), batch(), [], []
    compiled = torch.compile(product, backend=backend)
    for seed in range(20):
        weight = weights(seed)[0]
        for _ in range(2):
            weight.grad = None
            compiled(x, weight).backward()
            (dense,) = torch.autograd.grad(product(x, weight), [weight])
            assert STORE.all_of(weight) == (weight.grad.subspace,)
            torch.testing.assert_close(weight.grad.factor, dense @ weight.grad.basis.detach())
        ids.append(id(weight))
        bases.append(weakref.ref(weight.grad.basis))
        del weight
        gc.collect()
    assert len(set(ids)) < len(ids)
    assert len(backend.compiled_graphs()) == 1
    assert all(basis() is None for basis in bases)  # the graph, which lives on, keeps none


def test_what_averages_gradients_is_looked_up_again(monkeypatch) -> None:
    """A weight that `prepare` has taken over after the first call is averaged, and no longer once it is let go of."""
    model = net()
    compiled = torch.compile(model, backend=oasis_backend(rank=3, **EAGER))
    for _ in range(3):
        backward(compiled, batch())
    subspace = model[0].weight.grad.subspace

    class Averages:
        replicas = frozenset({0, 1})

    syncs, changes = [Averages()], [0]
    monkeypatch.setattr(lender, "sync_of", lambda weight: syncs[0] if syncs else None)
    monkeypatch.setattr(lender, "state_of_syncs", lambda: changes[0])
    backward(compiled, batch())
    assert not subspace.replicas  # nothing has said that there is one
    changes[0] = 1
    backward(compiled, batch())
    assert subspace.replicas == {0, 1}
    syncs.clear()  # without a word
    gc.collect()
    backward(compiled, batch())
    assert not subspace.replicas


def test_a_gradient_is_built_once(monkeypatch) -> None:
    made = []
    make = low_rank_grad.make_wrapper
    monkeypatch.setattr(low_rank_grad, "make_wrapper", lambda *given: made.append(given) or make(*given))
    model, kept = net(), []
    model[0].weight.register_hook(lambda gradient: kept.append(weakref.ref(gradient)))
    backward(torch.compile(model, backend=oasis_backend(rank=3, **EAGER)), batch())
    assert len(made) == 2
    assert model[0].weight.grad is kept[0]()


def test_what_is_detached_in_a_hook_is_another_tensor_over_the_same_gradient() -> None:
    """As of a dense gradient: in place, both change; what is assigned to one is not the other's."""
    for compile_it in (False, True):
        model, kept, same = net(), [], []
        weight = model[0].weight

        def hook(gradient: torch.Tensor, kept=kept, same=same) -> None:
            kept.append(gradient.detach())
            same.append(kept[0] is gradient)

        weight.register_hook(hook)
        backward(torch.compile(model, backend=oasis_backend(rank=12, **EAGER)) if compile_it else model, batch())
        assert same == [False] and kept[0] is not weight.grad
        weight.grad.mul_(2)
        torch.testing.assert_close(kept[0].clone().norm(), weight.grad.norm())
        (found,) = torch.autograd.grad(model(batch()).sum(), [weight])
        assert found.detach() is not found
