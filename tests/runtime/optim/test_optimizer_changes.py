"""OasisAdamW when its circumstances change: other kinds of gradients, other subspaces, bfloat16 weights."""

from __future__ import annotations

import pytest
import torch

from oasis_fx.runtime.optim.adamw import OasisAdamW
from oasis_fx.runtime.optim.items import find_items
from oasis_fx.runtime.optim.plan import low_rank_batches
from oasis_fx.runtime.optim.preparation import prepare_state
from oasis_fx.runtime.optim.step import begin_step, step_low_rank
from oasis_fx.runtime.subspaces.rules import Oja
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

SPEC = SubspaceSpec(3, Oja(lr=0.7))
BETAS = (0.8, 0.95)


def inputs(step: int) -> torch.Tensor:
    return torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def test_a_dense_gradient_of_a_low_rank_weight_is_projected(products, make_weight) -> None:
    w, reference = make_weight(5, 8), make_weight(5, 8)
    one, other = OasisAdamW([w], lr=0.1), OasisAdamW([reference], lr=0.1)
    for step in range(3):
        for weight, optimizer in ((w, one), (reference, other)):
            (y,) = products(inputs(step), [weight], SPEC)
            y.square().sum().backward()
            if weight is w and step == 1:
                q = weight.grad.basis.detach()
                outside = torch.randn(5, 8, dtype=torch.float64) @ (torch.eye(8, dtype=torch.float64) - q @ q.T)
                weight.grad = weight.grad.to_dense() + outside
            optimizer.step(), optimizer.zero_grad()
    torch.testing.assert_close(w, reference, rtol=1e-9, atol=1e-9)


def test_moments_go_over_to_another_subspace(products, make_weight) -> None:
    """Another backend, or a graph that binds the weight to another's basis: transport, not loss."""
    w = make_weight(5, 8)
    optimizer = OasisAdamW([w], lr=0.0, betas=BETAS)
    (y,) = products(inputs(0), [w], SPEC)
    y.sum().backward()
    optimizer.step(), optimizer.zero_grad()
    old_basis, old_mean = optimizer.state[w]["basis"].clone(), optimizer.state[w]["exp_avg"].clone()
    other_spec = SubspaceSpec(3, Oja(lr=5.0))
    (y,) = products(inputs(1), [w], other_spec)
    y.sum().backward()
    g, new = w.grad.factor.clone(), w.grad.basis.detach().clone()
    with torch.no_grad():
        prepare_state(optimizer, next(iter(find_items(optimizer))))
        torch.testing.assert_close(optimizer.state[w]["exp_avg"], old_mean @ (old_basis.T @ new))
        step_low_rank(optimizer, low_rank_batches(optimizer, list(find_items(optimizer))), begin_step(optimizer, None))
    expected = BETAS[0] * old_mean @ (old_basis.T @ new) + (1 - BETAS[0]) * g
    torch.testing.assert_close(optimizer.state[w]["exp_avg"], expected)


def test_another_rank_is_refused_before_anything_changes(products, make_weight) -> None:
    w, bias = make_weight(5, 8), torch.nn.Parameter(torch.ones(2))
    optimizer = OasisAdamW([("bias", bias), ("layer.weight", w)], lr=0.1)
    (y,) = products(inputs(0), [w], SPEC)
    y.sum().backward()
    optimizer.step(), optimizer.zero_grad()
    (y,) = products(inputs(1), [w], SubspaceSpec(2))
    y.sum().backward()
    bias.grad = torch.ones(2)
    before = w.detach().clone()
    with pytest.raises(
        ValueError, match=r"layer\.weight has moments of shape \(5, 3\) and a gradient of shape \(5, 2\)"
    ):
        optimizer.step()
    assert torch.equal(w, before) and torch.equal(bias, torch.ones(2))


# bfloat16


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("rounding", [None, False])
def test_a_tiny_learning_rate_moves_bfloat16_weights_on_average(low_rank, rounding, products) -> None:
    w = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = OasisAdamW([w], lr=1e-4, weight_decay=0.0, stochastic_rounding=rounding)
    spec = SubspaceSpec(64)  # all of the space: the update is the sign of the gradient
    for _ in range(20):
        if low_rank:
            x = torch.eye(64, dtype=torch.bfloat16)
            (y,) = products(x, [w], spec)
            y.sum().backward()
        else:
            w.grad = torch.ones_like(w)
        optimizer.step(), optimizer.zero_grad()
    moved = 1 - float(w.double().mean())
    if rounding is False:
        assert moved == 0  # half a step of bfloat16 below 1 is 2e-3: rounded to nearest, nothing happens
    elif low_rank:
        assert moved > 2e-4
    else:
        assert moved == pytest.approx(20 * 1e-4, rel=0.1)


def test_low_rank_moments_of_bfloat16_weights_are_float32(products) -> None:
    w = torch.nn.Parameter(torch.randn(6, 8).bfloat16())
    optimizer = OasisAdamW([w], lr=1e-2)
    (y,) = products(torch.randn(9, 8).bfloat16(), [w], SPEC)
    y.sum().backward()
    optimizer.step()
    assert optimizer.state[w]["exp_avg"].dtype == torch.float32 == STORE.existing(w, SPEC).basis.dtype


def test_stochastic_rounding_repeats_itself(products) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(len(results))
        w = torch.nn.Parameter(torch.ones(6, 8, dtype=torch.bfloat16))
        optimizer = OasisAdamW([w], lr=1e-3)
        for step in range(3):
            (y,) = products(inputs(step).bfloat16(), [w], SPEC)
            y.sum().backward()
            optimizer.step(), optimizer.zero_grad()
        results.append(w)
    assert torch.equal(*results)
