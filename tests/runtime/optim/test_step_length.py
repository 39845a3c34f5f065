"""How far a step goes: the factor for the rank, and steps outside of the subspace."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD, oasis_backend

N, M, RANK, LR = 12, 5, 3, 1e-2


def model_and_gradient(subspace="oja", bias: bool = False, m: int = M):
    """A layer with a low-rank gradient, and the same with its dense one."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Linear(N, m, bias=bias).double()
    plain = copy.deepcopy(model)
    x = torch.randn(40, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=subspace, inner="aot_eager"))
    for run in (compiled, plain):
        run(x).sin().square().sum().backward()
    return model, plain


def moved(model, optimizer) -> torch.Tensor:
    before = model.weight.detach().clone()
    optimizer.step()
    return model.weight.detach() - before


@pytest.mark.parametrize("make", [OasisAdamW, OasisLion], ids=lambda make: make.__name__)
def test_a_step_is_as_long_as_a_dense_one(make) -> None:
    model, plain = model_and_gradient()
    low = moved(model, make(model.parameters(), LR, weight_decay=0.0))
    dense = moved(plain, make(plain.parameters(), LR, weight_decay=0.0))
    assert torch.linalg.matrix_rank(low) == RANK
    assert float(low.norm()) == pytest.approx(float(dense.norm()), rel=1e-5)


@pytest.mark.parametrize("subspace", ["oja", "random"])
@pytest.mark.parametrize("m", [2, M, 20], ids="{} rows".format)
def test_a_step_of_muon_is_as_long_as_a_dense_one(subspace, m) -> None:
    """The orthogonalised gradient of m x n has norm sqrt(min(m, n)), and in a subspace sqrt(min(m, r))."""
    model, _ = model_and_gradient(subspace, m=m)
    step = moved(model, OasisMuon(model.parameters(), LR, weight_decay=0.0, scale=0.5))
    # The columns of a random basis have the length sqrt(n / r) on average only.
    rel = 1e-6 if subspace == "oja" else 0.5
    assert float(step.norm()) == pytest.approx(LR * 0.5 * math.sqrt(m * N), rel=rel)


MUON_FACTOR = math.sqrt(M / RANK)  # M is under N


@pytest.mark.parametrize(
    ("make", "factor"),
    [(OasisAdamW, math.sqrt(N / RANK)), (OasisLion, math.sqrt(N / RANK)), (OasisMuon, MUON_FACTOR)],
    ids=["OasisAdamW", "OasisLion", "OasisMuon"],
)
def test_the_factor_is_of_the_step_and_not_of_the_decay(make, factor) -> None:
    found = {}
    for scaling in (True, False):
        model, _ = model_and_gradient()
        start = model.weight.detach().clone()
        step = moved(model, make(model.parameters(), LR, weight_decay=0.3, rank_scaling=scaling))
        found[scaling] = step + LR * 0.3 * start
    torch.testing.assert_close(found[True], factor * found[False], rtol=1e-9, atol=1e-12)


def test_a_basis_that_has_the_factor_in_it_gets_no_other() -> None:
    found = {}
    for scaling in (True, False):
        torch.manual_seed(7)
        model, _ = model_and_gradient("random")
        found[scaling] = moved(model, OasisAdamW(model.parameters(), LR, rank_scaling=scaling))
    assert torch.equal(found[True], found[False])


def test_a_checkpoint_from_before_it_goes_on_without_it() -> None:
    model, _ = model_and_gradient()
    optimizer = OasisAdamW(model.parameters(), LR, weight_decay=0.0)
    state = optimizer.state_dict()
    del state["param_groups"][0]["rank_scaling"]
    optimizer.load_state_dict(state)
    assert float(moved(model, optimizer).norm()) == pytest.approx(LR * math.sqrt(M * RANK), rel=1e-4)


@pytest.mark.parametrize("value", [None, 1, "yes"])
@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (OasisAdamW, "rank_scaling"),
        (OasisAdamW, "step_outside_subspace"),
        (OasisLion, "rank_scaling"),
        (OasisMuon, "rank_scaling"),
    ],
)
def test_flags_are_flags(optimizer, name, value) -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=f"{name} is {value!r}: it must be True or False"):
        optimizer([weight], **{name: value})
    assert name not in OasisSGD([weight]).defaults


def test_a_dense_gradient_moves_the_weight_outside_of_its_subspace_too() -> None:
    changes = {}
    for outside in (True, False):
        model, _ = model_and_gradient(bias=True)
        optimizer = OasisAdamW(model.parameters(), LR, weight_decay=0.1, step_outside_subspace=outside)
        optimizer.step()
        gradient = torch.randn(M, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        model.weight.grad, model.bias.grad = gradient.clone(), None
        state = optimizer.state[model.weight]
        q, mean, second = (state[key].clone() for key in ("basis", "exp_avg", "exp_avg_sq"))
        changes[outside] = moved(model, optimizer)
    g = gradient @ q
    mean, second = 0.9 * mean + 0.1 * g, 0.999 * second + 0.001 * g.square()
    u = mean / (1 - 0.9**2) / ((second / (1 - 0.999**2)).sqrt() + 1e-8)
    outside = (gradient - g @ q.T) * u.norm(dim=1, keepdim=True) / g.norm(dim=1, keepdim=True)
    torch.testing.assert_close(changes[True] - changes[False], -LR * outside, rtol=1e-6, atol=1e-12)
    assert float(outside.norm()) > 1
    torch.testing.assert_close(outside @ q, torch.zeros(M, RANK, dtype=torch.float64), rtol=0, atol=1e-9)


def test_full_rank_steps_now_and_then() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(N, 32), torch.nn.Tanh(), torch.nn.Linear(32, N))
    compiled = torch.compile(model, backend=oasis_backend(2, inner="aot_eager"))
    exact = torch.compile(model, backend="aot_eager")
    optimizer = OasisAdamW(model.parameters(), 3e-3, step_outside_subspace=True)
    x = torch.randn(64, N, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(40):
        loss = ((exact if step % 5 == 4 else compiled)(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (32, 2)
    assert losses[-1] < 0.8 * losses[0]
