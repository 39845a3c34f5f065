"""By whatever road a gradient reaches the optimizer, its weight stays in its subspace and the basis moves.

At full rank plain SGD with momentum does not depend on the basis, so every road must take the weights where
torch's own SGD takes those of the eager model.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from oasis_fx import LowRankGrad, OasisAdamW, OasisWarning, oasis_backend
from oasis_fx.runtime.optim.sgd import OasisSGD
from oasis_fx.runtime.subspaces.basis_updates import update_bases
from oasis_fx.runtime.subspaces.missed_moves import IDLE_STEPS
from oasis_fx.runtime.subspaces.store import STORE

pytestmark = pytest.mark.filterwarnings("ignore::oasis_fx.LowRankGradWarning")
N = 6


def make_net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(N, N), torch.nn.Tanh(), torch.nn.Linear(N, N)).double()


def batch(step: int) -> torch.Tensor:
    return torch.randn(9, N, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def weights_of(net) -> list[torch.nn.Parameter]:
    return [p for p in net.parameters() if p.dim() == 2]


def loss_of(model, step):
    return model(batch(step)).square().mean()


def penalty(net):
    return sum(w.abs().sum() for w in weights_of(net)) * 1e-2


# Each road is a function of the callable model, its module, the optimizer and the number of the step.


def plain(model, net, optimizer, step):
    loss_of(model, step).backward()


def penalty_in_one_pass(model, net, optimizer, step):
    (loss_of(model, step) + penalty(net)).backward()


def penalty_in_two_passes(model, net, optimizer, step):
    loss_of(model, step).backward()
    penalty(net).backward()


def penalty_first(model, net, optimizer, step):
    penalty(net).backward()
    loss_of(model, step).backward()


def clamping_hook(model, net, optimizer, step):
    handles = [w.register_hook(lambda g: g.clamp(-0.05, 0.05)) for w in weights_of(net)]
    loss_of(model, step).backward()
    for handle in handles:
        handle.remove()


def nan_hook(model, net, optimizer, step):
    handles = [w.register_hook(torch.nan_to_num) for w in weights_of(net)]
    loss_of(model, step).backward()
    for handle in handles:
        handle.remove()


def post_accumulate_hook(model, net, optimizer, step):
    def double(w):
        w.grad = w.grad.to_dense() * 2 if isinstance(w.grad, LowRankGrad) else w.grad * 2

    handles = [w.register_post_accumulate_grad_hook(double) for w in weights_of(net)]
    loss_of(model, step).backward()
    for handle in handles:
        handle.remove()


def replaced(model, net, optimizer, step):
    loss_of(model, step).backward()
    for w in weights_of(net):
        w.grad = (w.grad.to_dense() if isinstance(w.grad, LowRankGrad) else w.grad) * 0.5


def frozen_rows(model, net, optimizer, step):
    loss_of(model, step).backward()
    for w in weights_of(net):
        w.grad[:2] = 0


def clipped_by_value(model, net, optimizer, step):
    loss_of(model, step).backward()
    torch.nn.utils.clip_grad_value_(net.parameters(), 0.02)


def surgery(model, net, optimizer, step):
    """PCGrad: gradients of two losses, each projected off the other where they conflict."""
    flat = []
    for part in (0, 100):
        optimizer.zero_grad()
        loss_of(model, step + part).backward()
        flat.append([p.grad.clone() for p in net.parameters()])
    product = sum((a * b).sum() for a, b in zip(*flat, strict=True))
    norm = sum(b.square().sum() for b in flat[1])
    for p, a, b in zip(net.parameters(), *flat, strict=True):
        p.grad = (a - b * (product / norm).clamp(max=0)) + b


def backward_inputs(model, net, optimizer, step):
    loss_of(model, step).backward(inputs=list(net.parameters()))


def autograd_grad(model, net, optimizer, step):
    parameters = list(net.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss_of(model, step), parameters), strict=True):
        p.grad = g


def eager_first_step(model, net, optimizer, step):
    loss_of(net if step == 0 else model, step).backward()


def eager_now_and_then(model, net, optimizer, step):
    loss_of(net if step % 2 else model, step).backward()


def a_second_model_uses_it(model, net, optimizer, step):
    (loss_of(model, step) + (batch(step) @ weights_of(net)[0]).square().mean()).backward()


def not_set_to_none(model, net, optimizer, step):
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, step).backward()


ROADS = [
    plain,
    penalty_in_one_pass,
    penalty_in_two_passes,
    penalty_first,
    clamping_hook,
    nan_hook,
    post_accumulate_hook,
    replaced,
    frozen_rows,
    clipped_by_value,
    surgery,
    backward_inputs,
    autograd_grad,
    eager_first_step,
    eager_now_and_then,
    a_second_model_uses_it,
    not_set_to_none,
]


def train(road, net, model, optimizer, steps, after=lambda: None):
    for step in range(steps):
        optimizer.zero_grad()
        road(model, net, optimizer, step)
        optimizer.step()
        after()


@pytest.mark.parametrize("road", ROADS)
def test_every_road_is_right_at_full_rank_and_moves_the_bases(road) -> None:
    net, reference = make_net(), make_net()
    model = torch.compile(net, backend=oasis_backend(rank=N, inner="aot_eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if road is eager_first_step else "error", OasisWarning)
        optimizer = OasisSGD(net.parameters(), lr=0.3, momentum=0.9)
        train(road, net, model, optimizer, 5)
    train(road, reference, reference, torch.optim.SGD(reference.parameters(), lr=0.3, momentum=0.9), 5)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    compiled_steps = {eager_first_step: 4, eager_now_and_then: 3}.get(road, 5)
    for w in weights_of(net):
        (subspace,) = STORE.all_of(w)
        assert int(subspace.num_updates) == compiled_steps
        assert optimizer.state[w]["momentum_buffer"].shape == (N, N) and "features" in optimizer.state[w]


def test_a_graph_that_is_compiled_in_the_middle_of_an_accumulation_leaves_gradients_low_rank() -> None:
    net, reference = make_net(), make_net()
    model = torch.compile(net, backend=oasis_backend(rank=2, inner="aot_eager"), dynamic=False)
    for rows in (9, 5, 7):  # a graph for each
        for run in (model, reference):
            run(batch(rows)[:rows]).square().sum().backward()
    for w, expected in zip(weights_of(net), weights_of(reference), strict=True):
        assert w.grad.is_low_rank
        torch.testing.assert_close(w.grad.factor, expected.grad @ w.grad.basis)


@pytest.mark.parametrize("road", [backward_inputs, autograd_grad, nan_hook, replaced])
def test_at_a_low_rank_each_road_is_the_plain_loop(road) -> None:
    """Their gradients are those of the plain loop, up to a factor; AdamW's step does not depend on one."""
    nets = [make_net(), make_net()]
    for net, way in zip(nets, (road, plain), strict=True):
        model = torch.compile(net, backend=oasis_backend(rank=2, inner="aot_eager"))
        optimizer = OasisAdamW(net.parameters(), lr=0.05, eps=0.0)
        train(way, net, model, optimizer, 5)
        for w in weights_of(net):
            assert optimizer.state[w]["exp_avg"].shape == (N, 2)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("road", [plain, penalty_in_one_pass, nan_hook, replaced, backward_inputs, autograd_grad])
def test_a_stock_optimizer_is_right_and_update_bases_moves_the_bases(road) -> None:
    net, reference = make_net(), make_net()
    model = torch.compile(net, backend=oasis_backend(rank=N, inner="aot_eager"))
    ours, theirs = (torch.optim.SGD(x.parameters(), lr=0.3, momentum=0.9) for x in (net, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OasisWarning)
        train(road, net, model, ours, 4, after=lambda: update_bases(net.parameters()))
    train(road, reference, reference, theirs, 4)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for w in weights_of(net):
        (subspace,) = STORE.all_of(w)
        assert int(subspace.num_updates) == 4


def test_a_stock_optimizer_gets_one_warning_with_the_cure(monkeypatch) -> None:
    monkeypatch.setattr("oasis_fx.runtime.gradients.foreign._warned", set())
    net = make_net()
    model = torch.compile(net, backend=oasis_backend(rank=2, inner="aot_eager"))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    with pytest.warns(OasisWarning, match=r"AdamW is given full-size .* OasisAdamW .*update_bases\(") as caught:
        train(plain, net, model, optimizer, 3)
    (found,) = [w for w in caught if w.category is OasisWarning]
    assert found.filename == __file__


def test_an_optimizer_of_ours_warns_where_nothing_was_compiled() -> None:
    net = make_net()
    optimizer = OasisAdamW(net.parameters(), lr=0.1)
    with pytest.warns(OasisWarning, match="none of the 2 matrices .* is in a subspace") as caught:
        train(plain, net, net, optimizer, 3)
    (found,) = [w for w in caught if w.category is OasisWarning]
    assert found.filename == __file__


def test_a_basis_that_never_moves_is_named_after_ten_steps() -> None:
    net = make_net()
    backend = oasis_backend(rank=2, inner="aot_eager")
    model = torch.compile(net, backend=backend)
    optimizer = OasisAdamW(net.parameters(), lr=0.01)
    train(plain, net, model, optimizer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OasisWarning)
        train(plain, net, net, optimizer, IDLE_STEPS - 1)  # eager
    with pytest.warns(
        OasisWarning, match=r"0\.weight has not moved for 10 optimizer steps: no gradient came"
    ) as caught:
        train(plain, net, net, optimizer, 5)
    assert sum("0.weight" in str(w.message) for w in caught) == 1
    assert [s.missed for s in backend.stats()] == [IDLE_STEPS + 4] * 2
    assert "missed" in str(backend.stats())
    train(plain, net, model, optimizer, 1)
    assert all(subspace.num_idle_steps == 0 for w in weights_of(net) for subspace in STORE.all_of(w))


def test_a_statistic_that_is_always_zero_is_named_too() -> None:
    net = make_net()
    model = torch.compile(net, backend=oasis_backend(rank=2, inner="aot_eager"))
    optimizer = OasisAdamW(net.parameters(), lr=0.01)
    with pytest.warns(OasisWarning, match=r"0\.weight has not moved .* statistic is zero"):
        for _ in range(IDLE_STEPS):
            optimizer.zero_grad()
            model(torch.zeros(9, N, dtype=torch.float64)).square().sum().backward()
            optimizer.step()


def test_dense_states_are_projected_when_their_weight_comes_into_a_subspace() -> None:
    """At full rank: with the basis at the identity, AdamW goes on as if nothing had happened."""
    net, reference = make_net(), make_net()
    model = torch.compile(net, backend=oasis_backend(rank=N, inner="aot_eager"))
    ours = OasisAdamW(net.parameters(), lr=0.05, rank_scaling=False)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OasisWarning)
        train(plain, net, net, ours, 3)
    train(plain, reference, reference, theirs, 3)
    loss_of(model, 9).backward()
    for w in weights_of(net):
        (subspace,) = STORE.all_of(w)
        with torch.no_grad():
            subspace.basis.copy_(torch.eye(N, dtype=torch.float64))
    ours.zero_grad(), theirs.zero_grad()
    for optimizer, run in ((ours, model), (theirs, reference)):
        loss_of(run, 10).backward()
        optimizer.step()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_stock_checkpoint_of_adamw_goes_on_in_the_subspace() -> None:
    net, other = make_net(), make_net()
    stock = torch.optim.AdamW(net.parameters(), lr=0.05)
    train(plain, net, net, stock, 3)
    other.load_state_dict(net.state_dict())
    model = torch.compile(other, backend=oasis_backend(rank=2, inner="aot_eager"))
    optimizer = OasisAdamW(other.parameters(), lr=0.05)
    optimizer.load_state_dict(
        {**copy.deepcopy(stock.state_dict()), **{"param_groups": optimizer.state_dict()["param_groups"]}}
    )
    loss_of(model, 3).backward()
    w = weights_of(other)[0]
    expected = stock.state[weights_of(net)[0]]["exp_avg"] @ w.grad.basis
    moved = 0.9 * expected + 0.1 * w.grad.factor
    optimizer.step()
    overlap = STORE.all_of(w)[0].latest_move.overlap
    torch.testing.assert_close(optimizer.state[w]["exp_avg"], moved @ overlap)
    assert float(optimizer.state[w]["step"]) == 4
