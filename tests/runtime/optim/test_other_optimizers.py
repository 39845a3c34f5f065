"""SGD, Lion and Muon in subspaces against their equations, written out; what all optimizers have in common."""

from __future__ import annotations

import math

import pytest
import torch

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD, oasis_backend
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.coordinates import transport_pending
from oasis_fx.runtime.optim.items import find_items
from oasis_fx.runtime.optim.muon import _limited, orthogonalize
from oasis_fx.runtime.optim.plan import dense_batches, low_rank_batches
from oasis_fx.runtime.optim.preparation import prepare_state
from oasis_fx.runtime.optim.step import begin_step, step_dense, step_low_rank
from oasis_fx.runtime.subspaces.rules import rule_of

RANK, LR, STEPS = 3, 0.05, 7


class Net(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 6)
        self.to(dtype)

    def forward(self, x):
        return self.layer(x)


def loss_of(model, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(40, 8, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 2, 8)
    y = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return (model(x.to(dtype)) - y.to(dtype)).square().mean()


def train(make, steps=range(STEPS), dtype=torch.float64, rank=RANK):
    """The basis is that of a PCA of every other batch: it is known without asking the code under test."""
    torch._dynamo.reset()
    model = Net(dtype)
    compiled = torch.compile(model, backend=oasis_backend(rank, subspace=rule_of("pca", every=2), inner="aot_eager"))
    optimizer = make(model.parameters())
    for step in steps:
        loss_of(compiled, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def reference(step_of, dense_step_of, decay: float) -> Net:
    """``step_of(m, G, t)`` returns the moment and U; ``m`` is None at first, and goes over by R = Q^T Q+."""
    model, q, m, moments = Net(), None, None, {}
    for step in range(STEPS):
        loss = loss_of(model, step)
        weight, bias = model.layer.weight, model.layer.bias
        dw, db = torch.autograd.grad(loss, (weight, bias))
        if step % 2 == 0:
            x = torch.randn(40, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            x = x * torch.linspace(0.2, 2, 8)
            new = torch.linalg.svd(x, full_matrices=False).Vh[:RANK].T
            m = m if m is None else m @ (q.T @ new)
            q = new
        m, u = step_of(m, dw @ q, step + 1)
        moments["bias"], u_bias = dense_step_of(moments.get("bias"), db, step + 1)
        with torch.no_grad():
            weight.mul_(1 - LR * decay).sub_(LR * u @ q.T)
            bias.mul_(1 - LR * decay).sub_(LR * u_bias)
    return model


def assert_same(found: Net, expected: Net) -> None:
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov) -> None:
    def step_of(m, g, t):
        m = g if m is None else 0.8 * m + g
        return m, g + 0.8 * m if nesterov else m

    found, _ = train(lambda p: OasisSGD(p, LR, 0.8, 0.1, nesterov=nesterov))
    assert_same(found, reference(step_of, step_of, 0.1))


def test_sgd_at_full_rank_is_torch_s() -> None:
    found, _ = train(lambda p: OasisSGD(p, LR, 0.9), rank=8)
    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), LR, 0.9)
    for step in range(STEPS):
        loss_of(plain, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(found, plain)


def test_lion() -> None:
    def step_of(m, g, t):
        m = torch.zeros_like(g) if m is None else m
        return 0.95 * m + 0.05 * g, torch.sign(0.9 * m + 0.1 * g)

    found, _ = train(lambda p: OasisLion(p, LR, (0.9, 0.95), 0.1, rank_scaling=False))
    # Signs of singular vectors do not matter: sign(-g) q^T (-1) is the same update.
    assert_same(found, reference(step_of, step_of, 0.1))


def test_muon() -> None:
    norms = []

    def step_of(m, g, t):
        m = g if m is None else 0.9 * m + g
        u, _, vh = torch.linalg.svd(m, full_matrices=False)
        o = u @ vh
        if norms and o.norm() > 1.1 * norms[-1]:
            o = o / o.norm() * 1.1 * norms[-1]
        norms.append(o.norm())
        return m, 0.2 * math.sqrt(8) * o

    def adam(state, g, t):
        m, v = state or (torch.zeros_like(g), torch.zeros_like(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        return (m, v), m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    found, optimizer = train(lambda p: OasisMuon(p, LR, 0.9, 0.1, rank_scaling=False))
    assert_same(found, reference(step_of, adam, 0.1))
    states = [set(state) for state in optimizer.state.values()]
    assert "exp_avg_sq" not in states[0] and "momentum_buffer" not in states[1]


def test_the_norm_of_muon_s_updates_grows_by_a_tenth_at_most() -> None:
    """One direction at first, then three: without a limit the norm would go from 1 to sqrt(3)."""
    weight = torch.nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    optimizer = OasisMuon([weight])
    state = {}
    settings = optimizer.settings_of(optimizer.param_groups[0], weight.dtype)
    one = orthogonalize(torch.diag(torch.tensor([1.0, 0, 0]).double()))
    three = orthogonalize(torch.eye(3).double())
    norms = [
        float(_limited([state], o[None], Step(settings, None, torch.Generator())).norm())
        for o in (one, three, three, three)
    ]
    assert norms == pytest.approx([1.0, 1.1, 1.21, 1.331])


def test_orthogonalize_leaves_out_directions_without_a_length() -> None:
    m = torch.zeros(2, 5, 3, dtype=torch.float64)
    m[1] = torch.outer(torch.arange(1.0, 6.0).double(), torch.tensor([1.0, 2.0, 2.0]).double())
    o = orthogonalize(m)
    assert float(o[0].abs().max()) == 0 and float(o[1].norm()) == pytest.approx(1.0)


MAKERS = {
    "sgd": lambda p: OasisSGD(p, LR, weight_decay=0.1),
    "lion": lambda p: OasisLion(p, LR / 10),
    "muon": lambda p: OasisMuon(p, LR),
    "adamw": lambda p: OasisAdamW(p, LR),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(kind, tmp_path) -> None:
    whole, _ = train(MAKERS[kind])
    half, optimizer = train(MAKERS[kind], range(3))
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    torch._dynamo.reset()
    again = Net()
    again.load_state_dict(saved["model"])
    compiled = torch.compile(again, backend=oasis_backend(RANK, subspace=rule_of("pca", every=2), inner="aot_eager"))
    optimizer = MAKERS[kind](again.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(3, STEPS):
        loss_of(compiled, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found, expected in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gate_that_is_shut_leaves_everything_as_it_is(kind, dtype) -> None:
    """What a GPU does with a step whose gradient is not finite, without waiting for it."""
    model, optimizer = train(MAKERS[kind], range(2), dtype)
    compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=rule_of("pca", every=2), inner="aot_eager"))
    loss_of(compiled, 2).backward()
    transport_pending(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    states = [{k: v.clone() for k, v in s.items() if isinstance(v, torch.Tensor)} for s in optimizer.state.values()]
    items = list(find_items(optimizer))
    for item in items:
        prepare_state(optimizer, item)
    for flag, changes in ((False, False), (True, True)):
        context = begin_step(optimizer, torch.tensor(flag))
        with torch.no_grad():
            step_low_rank(optimizer, low_rank_batches(optimizer, [i for i in items if i.low_rank]), context)
            step_dense(optimizer, dense_batches(optimizer, [i for i in items if not i.low_rank]), context)
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert same != changes
        for state, old in zip(optimizer.state.values(), states, strict=True):
            own = [key for key in old if key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer", "update_norm")]
            assert all(torch.equal(state[key], old[key]) for key in own) != changes


@pytest.mark.parametrize("kind", MAKERS)
def test_bfloat16_weights_move_though_each_step_is_below_their_last_digit(kind) -> None:
    torch._dynamo.reset()
    model = Net(torch.bfloat16)
    start = model.layer.weight.detach().clone()
    compiled = torch.compile(model, backend=oasis_backend(RANK, inner="aot_eager"))
    optimizer = MAKERS[kind](model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 2e-5
    for _ in range(3):
        loss_of(compiled, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.layer.weight, start)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: OasisSGD(p, -1.0), r"lr is -1.0"),
        (lambda p: OasisSGD(p, momentum=1.0), r"momentum is 1.0: it must be a number in \[0, 1\)"),
        (lambda p: OasisLion(p, betas=(0.9,)), r"betas is \(0.9,\)"),
        (lambda p: OasisLion(p, weight_decay=math.nan), r"weight_decay is nan"),
        (lambda p: OasisMuon(p, limit=1.0), r"limit is 1.0: it must be a number over 1"),
        (lambda p: OasisMuon(p, momentum=-0.1), r"momentum is -0.1"),
        (lambda p: OasisMuon(p, stochastic_rounding="no"), r"stochastic_rounding is 'no'"),
        (lambda p: OasisAdamW(p, full_size_states=1), r"full_size_states is 1"),
    ],
)
def test_bad_arguments(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make([torch.nn.Parameter(torch.zeros(2, 2))])


def test_a_state_of_another_optimizer_is_refused() -> None:
    _, sgd = train(MAKERS["sgd"], range(1))
    _, adam = train(MAKERS["adamw"], range(1))
    with pytest.raises(ValueError, match=r"has no saved 'exp_avg': OasisAdamW needs one"):
        adam.load_state_dict(sgd.state_dict())
