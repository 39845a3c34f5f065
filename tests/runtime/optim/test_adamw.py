"""OasisAdamW against AdamW in a moving subspace written out plainly, in dense float64 matrices."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.optim.adamw import OasisAdamW
from oasis_fx.runtime.optim.items import find_items
from oasis_fx.runtime.optim.plan import Plan
from oasis_fx.runtime.optim.preparation import prepare_state
from oasis_fx.runtime.optim.step import begin_step, move_all_bases, step_dense, step_low_rank
from oasis_fx.runtime.subspaces.rules import Oja
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

SPEC = SubspaceSpec(3, Oja(lr=0.7))
BETAS, EPS = (0.8, 0.95), 1e-6


class Reference:
    """One activation, the weights that read it, and their optimizer: matrices of full size, equations as written."""

    def __init__(self, q, weights, lr, decay):
        self.q, self.lr, self.decay, self.updates = q.clone(), lr, decay, 0
        self.w = [w.clone() for w in weights]
        self.m = [None] * len(weights)
        self.v = [None] * len(weights)
        self.t = [0] * len(weights)

    def step(self, dense_gradients, gram):
        b1, b2 = BETAS
        for i, dense in enumerate(dense_gradients):
            if dense is None:
                continue
            g = dense @ self.q
            self.t[i] += 1
            self.m[i] = (1 - b1) * g + (0 if self.m[i] is None else b1 * self.m[i])
            self.v[i] = (1 - b2) * g**2 + (0 if self.v[i] is None else b2 * self.v[i])
            u = (self.m[i] / (1 - b1 ** self.t[i])) / ((self.v[i] / (1 - b2 ** self.t[i])).sqrt() + EPS)
            self.w[i] = (1 - self.lr * self.decay) * self.w[i] - self.lr * u @ self.q.T
        c = gram @ self.q
        eta = 100.0 if self.updates == 0 else SPEC.rule.lr
        new, r = torch.linalg.qr(self.q + eta * c / (c.norm() / math.sqrt(self.q.shape[1])))
        new = new * r.diagonal().sign()
        overlap = self.q.T @ new
        self.q, self.updates = new, self.updates + 1
        for i, t in enumerate(self.t):
            if t:
                mean, second = self.m[i] / (1 - b1**t), self.v[i] / (1 - b2**t)
                turned = (second - mean**2) @ overlap**2 + (mean @ overlap) ** 2
                self.m[i], self.v[i] = self.m[i] @ overlap, (1 - b2**t) * turned.abs()


def inputs(step: int, n: int = 8) -> torch.Tensor:
    return torch.randn(20, n, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def backward(products, x, weights, active, spec=SPEC, transposed=False) -> list[torch.Tensor | None]:
    """Backward through the active weights; return their dense gradients."""
    ys = products(x, weights, spec, transposed)
    loss = sum((y.square().mean() + y.sum() * 0.1 for y, on in zip(ys, active, strict=True) if on))
    loss.backward()
    return [(y.detach() * 2 / y.numel() + 0.1).T @ x if on else None for y, on in zip(ys, active, strict=True)]


@pytest.mark.parametrize("transposed", [False, True])
def test_follows_the_equations_over_many_steps(transposed, products, make_weight) -> None:
    shapes = [(5, 8), (5, 8), (7, 8)]
    weights = [make_weight(*(s[::-1] if transposed else s), seed=i) for i, s in enumerate(shapes)]
    optimizer = OasisAdamW(weights, lr=0.05, betas=BETAS, eps=EPS, weight_decay=0.1, rank_scaling=False)
    stored = [w.detach().T if transposed else w.detach() for w in weights]
    q = STORE.resolve(weights, SPEC, [(0, 1) if transposed else (1, 2)] * 3).basis.detach()
    reference = Reference(q, stored, 0.05, 0.1)
    for step in range(25):
        # The last weight rests now and then: its moments must follow the basis all the same.
        active = [True, True, step % 3 != 1]
        x = inputs(step)
        dense = backward(products, x, weights, active, transposed=transposed)
        optimizer.step()
        optimizer.zero_grad()
        reference.step(dense, x.T @ x)
        for w, expected in zip(weights, reference.w, strict=True):
            torch.testing.assert_close(w.detach().T if transposed else w.detach(), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(STORE.existing(weights[0], SPEC).basis.detach(), reference.q, rtol=1e-9, atol=1e-9)
    for w, m, v in zip(weights, reference.m, reference.v, strict=True):
        torch.testing.assert_close(optimizer.state[w]["exp_avg"], m, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(optimizer.state[w]["exp_avg_sq"], v, rtol=1e-8, atol=1e-10)
        assert (optimizer.state[w]["exp_avg_sq"] >= 0).all()


def test_accumulated_batches_are_one_step(products, make_weight) -> None:
    one, other = make_weight(5, 8), make_weight(5, 8)
    optimizers = [OasisAdamW([w], lr=0.05) for w in (one, other)]
    for step in range(4):
        x1, x2 = inputs(2 * step), inputs(2 * step + 1)
        for x in (x1, x2):
            (y,) = products(x, [one], SPEC)
            y.sum().backward()
        (y,) = products(torch.cat([x1, x2]), [other], SPEC)
        y.sum().backward()
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_two_losses_in_one_step(products, make_weight) -> None:
    w, reference = make_weight(5, 8), make_weight(5, 8)
    (y,) = products(inputs(0), [w], SPEC)
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    (z,) = products(inputs(0), [reference], SPEC)
    (z.sum() + z.square().sum()).backward()
    torch.testing.assert_close(w.grad.factor, reference.grad.factor)
    OasisAdamW([w], lr=0.1).step(), OasisAdamW([reference], lr=0.1).step()
    torch.testing.assert_close(w, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_parameters_are_bitwise_torchs_adamw(dtype) -> None:
    ours = [
        torch.nn.Parameter(torch.randn(4, 3, dtype=dtype)),
        torch.nn.Parameter(torch.randn(7, dtype=dtype)),
    ]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.2}
    one, other = OasisAdamW(ours, **settings), torch.optim.AdamW(theirs, fused=True, **settings)
    for step in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) if step != 2 or p.dim() == 2 else None
            q.grad = None if p.grad is None else p.grad.clone()
        one.step(), other.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(one.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"])


def test_groups_have_their_own_settings(products, make_weight) -> None:
    fast, slow, bias = make_weight(5, 8, seed=1), make_weight(5, 8, seed=1), torch.nn.Parameter(torch.ones(3))
    groups = [
        {"params": [fast], "lr": 0.1},
        {"params": [slow], "lr": 0.01, "weight_decay": 0.0},
        {"params": [bias]},
    ]
    optimizer = OasisAdamW(groups, lr=0.5, weight_decay=0.3)
    before = fast.detach().clone()
    for y in products(inputs(0), [fast, slow], SPEC):
        y.sum().backward(retain_graph=True)
    bias.grad = torch.ones(3)
    optimizer.step()
    fast_step = fast.detach() - before * (1 - 0.1 * 0.3)
    torch.testing.assert_close(fast_step, 10 * (slow.detach() - before), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(bias.detach(), torch.full((3,), 1 - 0.5 * 0.3 - 0.5), rtol=1e-5, atol=1e-5)


def test_schedulers_of_torch_work(products, make_weight) -> None:
    w, reference = make_weight(5, 8), make_weight(5, 8)
    optimizer, plain = (
        OasisAdamW([w], lr=0.1, weight_decay=0.0),
        OasisAdamW([reference], lr=0.1, weight_decay=0.0),
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        ],
        milestones=[2],
    )
    for step in range(5):
        plain.param_groups[0]["lr"] = schedule.get_last_lr()[0]
        for weight, opt in ((w, optimizer), (reference, plain)):
            (y,) = products(inputs(step), [weight], SPEC)
            y.sum().backward()
            opt.step(), opt.zero_grad()
        schedule.step()
    assert torch.equal(w, reference) and optimizer.param_groups[0]["lr"] < 0.1


def test_lr_may_be_a_tensor(products, make_weight) -> None:
    w, reference = make_weight(5, 8), make_weight(5, 8)
    for weight, lr in ((w, torch.tensor(0.1, dtype=torch.float64)), (reference, 0.1)):
        (y,) = products(inputs(0), [weight], SPEC)
        y.sum().backward()
        OasisAdamW([weight], lr=lr).step()
    assert torch.equal(w, reference)


def test_closure(products, make_weight) -> None:
    w = make_weight(5, 8)
    optimizer = OasisAdamW([w], lr=0.05, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        (y,) = products(inputs(0), [w], SPEC)
        loss = y.square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


# What must not be updated


@pytest.mark.parametrize("where", ["activation", "gradient", "dense"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_non_finite_gradient_is_left_out(where, bad, products, make_weight) -> None:
    w, bias = make_weight(5, 8), torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = OasisAdamW([w, bias], lr=0.1)

    def step(x, scale=1.0, spoil=None):
        (y,) = products(x, [w], SPEC)
        ((y + bias).square().sum() * scale).backward()
        if spoil is not None:
            bias.grad[0] = spoil
        optimizer.step()
        optimizer.zero_grad()

    step(inputs(0))
    subspace = STORE.existing(w, SPEC)
    tensors = [
        w,
        bias,
        subspace.basis,
        subspace.num_updates,
        *optimizer.state[w].values(),
        *optimizer.state[bias].values(),
    ]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    before = [t.detach().clone() for t in tensors]
    with pytest.warns(RuntimeWarning, match="not finite"):
        if where == "activation":
            x = inputs(1)
            x[0, 0] = bad
            step(x)
        elif where == "gradient":
            step(inputs(1), scale=bad)
        else:
            step(inputs(1), spoil=bad)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert optimizer.num_skipped_steps == 1 and subspace.statistic is None
    step(inputs(2))
    assert not torch.equal(w, before[0]) and optimizer.num_skipped_steps == 1


def test_the_gate_for_devices_that_are_not_waited_for(products, make_weight, monkeypatch) -> None:
    """On a GPU the verdict stays on the device: the same step with a gate, run here on the CPU."""
    for finite in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            w, bias = make_weight(5, 8, dtype=dtype), torch.nn.Parameter(torch.ones(5, dtype=dtype))
            twin, twin_bias = copy.deepcopy(w), copy.deepcopy(bias)
            for weight, b in ((w, bias), (twin, twin_bias)):
                (y,) = products(inputs(0).to(dtype), [weight], SPEC)
                (y + b).square().mean().backward()
            gated, plain = OasisAdamW([w, bias], lr=0.1), OasisAdamW([twin, twin_bias], lr=0.1)
            before = [w.detach().clone(), bias.detach().clone(), w.grad.basis.detach().clone()]
            gate = torch.tensor(finite)
            items = list(find_items(gated))
            with torch.no_grad():
                for item in items:
                    prepare_state(gated, item)
                context, plan = begin_step(gated, gate), Plan(gated, items)
                step_low_rank(gated, plan.low_rank, context)
                step_dense(gated, plan.dense, context)
                move_all_bases(gated, plan, context)
            if finite:
                plain.step()
                assert torch.equal(gated.state[w]["exp_avg"], plain.state[twin]["exp_avg"])
                tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
                torch.testing.assert_close(w, twin, rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(bias, twin_bias, rtol=tolerance, atol=tolerance)
            else:
                assert torch.equal(w, before[0]) and torch.equal(bias, before[1])
                assert torch.equal(gated.state[w]["basis"], before[2])
                assert all(float(gated.state[p]["step"]) == 0 for p in (w, bias))
                assert gated.state[w]["exp_avg"].norm() == 0 == gated.state[bias]["exp_avg"].norm()


def test_grad_scaler_skips_the_step(products, make_weight) -> None:
    w = make_weight(5, 8, dtype=torch.float32)
    optimizer, scaler = OasisAdamW([w], lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    reference = copy.deepcopy(w)
    plain = OasisAdamW([reference], lr=0.1)
    for step, scale in enumerate((1.0, math.inf, 1.0)):
        x = inputs(step).float()
        (y,) = products(x, [w], SPEC)
        scaler.scale(y.sum() * scale).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        if scale == 1.0:
            (z,) = products(x, [reference], SPEC)
            z.sum().backward()
            plain.step(), plain.zero_grad()
    torch.testing.assert_close(w, reference, rtol=1e-5, atol=1e-6)
    assert optimizer.num_skipped_steps == 0


def test_a_batch_thrown_away_moves_no_basis(products, make_weight) -> None:
    w, reference = make_weight(5, 8), make_weight(5, 8)
    one, other = OasisAdamW([w], lr=0.1), OasisAdamW([reference], lr=0.1)
    (y,) = products(100 * inputs(7), [w], SPEC)
    y.sum().backward()
    one.zero_grad()
    for weight, optimizer in ((w, one), (reference, other)):
        (y,) = products(inputs(0), [weight], SPEC)
        y.sum().backward()
        optimizer.step()
    assert torch.equal(STORE.existing(w, SPEC).basis, STORE.existing(reference, SPEC).basis)
    assert torch.equal(w, reference)


def test_parameters_without_gradients_are_left_alone(make_weight) -> None:
    w = make_weight(5, 8)
    before = w.detach().clone()
    optimizer = OasisAdamW([w], lr=0.1)
    optimizer.step()
    assert torch.equal(w, before) and not optimizer.state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, r"lr is -1\.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": torch.ones(2)}, "lr is tensor"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0\.9, 1\.0\): it must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas is"),
        ({"stochastic_rounding": "yes"}, "stochastic_rounding is 'yes'"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        OasisAdamW([torch.nn.Parameter(torch.ones(1))], **arguments)
    with pytest.raises(ValueError, match=message):
        OasisAdamW([{"params": [torch.nn.Parameter(torch.ones(1))], **arguments}])


def test_gradients_stay_low_rank_throughout(products, make_weight) -> None:
    w = make_weight(5, 8)
    optimizer = OasisAdamW([w], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            (y,) = products(inputs(step), [w], SPEC)
            y.sum().backward()
            assert isinstance(w.grad, LowRankGrad)
            torch.nn.utils.clip_grad_norm_([w], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
