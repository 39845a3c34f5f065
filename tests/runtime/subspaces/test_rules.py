"""Each rule, compiled, against a plain reference of its paper's equations: float64, some steps, then equal weights."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.runtime.subspaces.batched_moves import POWER_STEP
from oasis_fx.runtime.subspaces.rules import DCT, GradientOja, GradientPower, PrincipalRandom, Rule, rule_of
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

from . import two_weights
from .two_weights import Net

RANK, LR, BETAS, EPS, STEPS = 4, 0.02, (0.9, 0.95), 1e-8, 7
SCALE = torch.linspace(0.3, 2, 12, dtype=torch.float64)  # the directions of X weigh differently
batch, loss_of = partial(two_weights.batch, scale=SCALE), partial(two_weights.loss_of, scale=SCALE)


def train(subspace: str | Rule, every: int | None = None, micro_batches: int = 1, **settings) -> tuple[Net, OasisAdamW]:
    torch._dynamo.reset()
    model = Net()
    torch.manual_seed(7)  # what rules draw comes after
    backend = oasis_backend(RANK, subspace=rule_of(subspace, every=every), inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = OasisAdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, rank_scaling=False, **settings
    )
    for step in range(STEPS):
        for part in range(micro_batches):
            loss_of(compiled, step * micro_batches + part).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


class Reference:
    """The same training in plain torch: per weight, ``project`` gives Q and G, Adam does the rest."""

    def __init__(self, *, transports: bool) -> None:
        self.model, self.transports = Net(), transports
        self.m = {}
        self.v = {}
        self.q = {}
        self.t = 0

    def gradients(self, step: int):
        """(name, weight, X, dY, dW) of both weights for one batch."""
        x, y = batch(step)
        h = self.model.up(x)
        a = torch.tanh(h)
        out = self.model.down(a)
        dh, do = torch.autograd.grad((out - y).square().mean(), (h, out))
        for name, weight, source, dy in (("up", self.model.up.weight, x, dh), ("down", self.model.down.weight, a, do)):
            yield name, weight, source.detach(), dy, dy.T @ source.detach()

    def moved(self, name: str, q: torch.Tensor) -> None:
        """A new basis: carry the moments over by LDAdam's equations."""
        if name in self.m and self.transports and self.t > 0:
            r = self.q[name].T @ q
            m_hat, v_hat = self.m[name] / (1 - BETAS[0] ** self.t), self.v[name] / (1 - BETAS[1] ** self.t)
            self.v[name] = (1 - BETAS[1] ** self.t) * ((v_hat - m_hat**2) @ (r * r) + (m_hat @ r) ** 2).abs()
            self.m[name] = self.m[name] @ r
        self.q[name] = q

    def direction(self, name: str, g: torch.Tensor, t: int) -> torch.Tensor:
        zero = torch.zeros_like(g)
        self.m[name] = BETAS[0] * self.m.get(name, zero) + (1 - BETAS[0]) * g
        self.v[name] = BETAS[1] * self.v.get(name, zero) + (1 - BETAS[1]) * g * g
        return self.m[name] / (1 - BETAS[0] ** t) / ((self.v[name] / (1 - BETAS[1] ** t)).sqrt() + EPS)

    @torch.no_grad()
    def add(self, weight: torch.Tensor, update: torch.Tensor) -> None:
        weight -= LR * update


def assert_same(model: Net, reference: Net) -> None:
    for (name, found), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def top(a: torch.Tensor, r: int = RANK) -> torch.Tensor:
    return torch.linalg.svd(a, full_matrices=False).Vh[:r].T


def test_pca_follows_the_singular_vectors_of_every_other_batch() -> None:
    reference = Reference(transports=True)
    for step in range(STEPS):
        for name, weight, x, dy, _ in list(reference.gradients(step)):
            if step % 2 == 0:
                reference.moved(name, top(x))
            q = reference.q[name]
            reference.add(weight, reference.direction(name, dy.T @ (x @ q), step + 1) @ q.T)
        reference.t = step + 1
    assert_same(train("pca", every=2)[0], reference.model)


def test_random_draws_anew_every_t_steps_and_keeps_moments() -> None:
    reference = Reference(transports=False)
    torch.manual_seed(7)
    seeds = {"up": int(torch.randint(1 << 31, ())), "down": int(torch.randint(1 << 31, ()))}
    assert seeds["up"] != seeds["down"]
    for step in range(STEPS):
        for name, weight, x, dy, _ in list(reference.gradients(step)):
            generator = torch.Generator().manual_seed(seeds[name] * 1_000_003 + step // 3)
            q = (torch.randn(x.shape[1], RANK, generator=generator) / math.sqrt(RANK)).double()  # N(0, 1/r)
            reference.add(weight, reference.direction(name, (x @ q).T.mm(dy).T, step + 1) @ q.T)
    model, optimizer = train("random", every=3)
    assert_same(model, reference.model)
    assert all("basis" not in state and state["basis_code"].numel() == 2 for state in optimizer.state.values())


@pytest.mark.parametrize("full_rank", [True, False])
def test_principal_random_is_the_paper_s_estimate(full_rank) -> None:
    reference = Reference(transports=True)
    torch.manual_seed(7)
    seeds = {"up": int(torch.randint(1 << 31, ())), "down": int(torch.randint(1 << 31, ()))}
    r1 = r2 = RANK // 2
    for step in range(STEPS):
        for name, weight, x, dy, _ in list(reference.gradients(step)):
            n = x.shape[1]
            if step % 3 == 0:
                q1 = top(x, r1)
                generator = torch.Generator().manual_seed(seeds[name] * 1_000_003 + step // 3)
                s = torch.randn(n, r2, generator=generator).double()
                q2 = torch.linalg.qr((torch.eye(n).double() - q1 @ q1.T) @ s).Q
                reference.moved(name, torch.cat([q1, q2], dim=1))
            q1, q2 = reference.q[name].split(r1, dim=1)
            estimate = x @ q1 @ q1.T + (n - r1) / r2 * (x @ q2) @ q2.T
            if full_rank:
                reference.add(weight, reference.direction(name, dy.T @ estimate, step + 1))
            else:
                q = reference.q[name]
                reference.add(weight, reference.direction(name, dy.T @ estimate @ q, step + 1) @ q.T)
        reference.t = step + 1 if not full_rank else 0
    model, optimizer = train("principal_random", every=3, full_size_states=full_rank)
    assert_same(model, reference.model)
    shapes = {tuple(state["exp_avg"].shape) for state in optimizer.state.values()}
    assert shapes == ({(16, 12), (10, 16)} if full_rank else {(16, RANK), (10, RANK)})


def test_principal_random_is_unbiased() -> None:
    """The mean of 4000 draws of Q diag(weights) Q^T is the identity: each entry within 5 standard errors.

    A false alarm in one of 144 entries has a probability of under 1e-4; the seed is fixed.
    """
    rule, n, draws = PrincipalRandom(), 12, 4000
    x, _ = batch(0)
    subspace = STORE._make([torch.nn.Parameter(torch.randn(3, n).double())], SubspaceSpec(RANK, rule), [(1, 2)])
    total, squares = torch.zeros(n, n).double(), torch.zeros(n, n).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        q = rule.choose(x, subspace, generator)
        estimate = q * rule.weights(n, RANK).double() @ q.T
        total += estimate
        squares += estimate.square()
    mean = total / draws
    error = ((squares / draws - mean.square()).clamp_min(0) / draws).sqrt()
    assert bool(((mean - torch.eye(n).double()).abs() <= 5 * error + 1e-12).all())


def test_sampled_forms_the_dense_gradient_from_columns_of_the_gram_matrix() -> None:
    reference = Reference(transports=False)
    torch.manual_seed(7)
    for step in range(STEPS):
        seeds = {"up": int(torch.randint(1 << 62, ())), "down": int(torch.randint(1 << 62, ()))}
        for name, weight, x, dy, _ in list(reference.gradients(step)):
            index = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seeds[name]))[:RANK]
            u = torch.linalg.qr(x.T @ x[:, index]).Q
            reference.add(weight, reference.direction(name, dy.T @ (x @ u) @ u.T, step + 1))
    model, optimizer = train("sampled")
    assert_same(model, reference.model)
    assert all("basis" not in state and "features" not in state for state in optimizer.state.values())


def on_the_smaller_side(dw: torch.Tensor) -> torch.Tensor:
    return dw if dw.shape[0] >= dw.shape[1] else dw.T


def back(update: torch.Tensor, dw: torch.Tensor) -> torch.Tensor:
    return update if dw.shape[0] >= dw.shape[1] else update.T


def test_gradient_svd_is_galore() -> None:
    """Moments are kept as they are when the basis moves, so signs of singular vectors matter: ours are fixed."""
    reference = Reference(transports=False)
    for step in range(STEPS):
        for name, weight, _, _, dw in list(reference.gradients(step)):
            a = on_the_smaller_side(dw)
            if step % 3 == 0:
                q = top(a)
                reference.moved(name, q * q.gather(0, q.abs().argmax(0, keepdim=True)).sign())
            q = reference.q[name]
            reference.add(weight, back(reference.direction(name, a @ q, step + 1) @ q.T, dw))
    model, optimizer = train("gradient_svd", every=3)
    assert_same(model, reference.model)
    assert {tuple(s["exp_avg"].shape) for s in optimizer.state.values()} == {(16, RANK)}


def test_gradient_oja_descends_the_reconstruction_error() -> None:
    reference = Reference(transports=False)
    eta = 0.3
    for step in range(STEPS):
        for name, weight, _, _, dw in list(reference.gradients(step)):
            a = on_the_smaller_side(dw)
            if step == 0:
                n = a.shape[1]
                generator = torch.Generator().manual_seed(n * 1_000_003 + RANK)
                reference.q[name] = torch.linalg.qr(torch.randn(n, RANK, dtype=torch.float64, generator=generator)).Q
            q = reference.q[name]
            reference.add(weight, back(reference.direction(name, a @ q, step + 1) @ q.T, dw))
            unit = (a / a.norm()).detach()
            p = q.clone().requires_grad_()
            (descent,) = torch.autograd.grad((unit @ p @ p.T - unit).square().sum(), p)
            rate = POWER_STEP if step == 0 else eta
            moved, upper = torch.linalg.qr(q - rate * descent)
            # The penalty's gradient is zero at Q^T Q = I, and that of the loss is -2 (I - Q Q^T) A^T A Q there.
            torch.testing.assert_close(descent, -2 * (unit.T @ unit @ q - q @ (q.T @ unit.T @ unit @ q)))
            reference.q[name] = moved * upper.diagonal().sign()
    torch._dynamo.reset()
    model = Net()
    backend = oasis_backend(RANK, subspace=GradientOja(lr=eta), inner="aot_eager", stats=False)
    compiled = torch.compile(model, backend=backend)
    optimizer = OasisAdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, rank_scaling=False)
    for step in range(STEPS):
        loss_of(compiled, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, reference.model)


@pytest.mark.parametrize("error_feedback", [False, True])
def test_gradient_power_is_ldadam(error_feedback) -> None:
    """LDAdam's equations, with rho = b1 as in its code."""
    reference, rho, beta = Reference(transports=True), BETAS[0], BETAS[0]
    error = {}
    for step in range(STEPS):
        for name, weight, _, _, dw in list(reference.gradients(step)):
            a = on_the_smaller_side(dw) + error.get(name, 0.0)
            if step == 0:
                reference.moved(name, top(a))
            else:
                old, m_before = reference.q[name], reference.m[name]
                m_hat = m_before / (1 - beta**step)
                b = rho * m_hat @ old.T + (1 - rho) * a
                q, upper = torch.linalg.qr(b.T @ b @ old)
                reference.moved(name, q * upper.diagonal().sign())
            q = reference.q[name]
            g = a @ q
            if error_feedback:
                error[name] = a - g @ q.T
                if step > 0:
                    error[name] += beta / (1 - beta) * (m_before @ old.T - reference.m[name] @ q.T)
            reference.add(weight, back(reference.direction(name, g, step + 1) @ q.T, dw))
        reference.t = step + 1
    model, optimizer = train(GradientPower(rho=rho, error_feedback=error_feedback))
    assert_same(model, reference.model)
    assert all(("basis_error" in state) == error_feedback for state in optimizer.state.values())


@pytest.mark.parametrize("side", ["activation", "gradient"])
def test_dct_picks_the_columns_that_hold_most(side) -> None:
    reference = Reference(transports=True)
    for step in range(STEPS):
        for name, weight, x, _, dw in list(reference.gradients(step)):
            batch_of = x if side == "activation" else on_the_smaller_side(dw)
            n = batch_of.shape[1]
            i, k = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
            d = torch.cos(math.pi * (2 * i + 1).double() * k / (2 * n)) * math.sqrt(2 / n)
            d[:, 0] /= math.sqrt(2)
            torch.testing.assert_close(d.T @ d, torch.eye(n).double())
            chosen = (batch_of @ d).norm(dim=0).topk(RANK).indices.sort().values
            reference.moved(name, d[:, chosen])
            q = reference.q[name]
            if side == "activation":
                reference.add(weight, reference.direction(name, dw @ q, step + 1) @ q.T)
            else:
                a = on_the_smaller_side(dw)
                reference.add(weight, back(reference.direction(name, a @ q, step + 1) @ q.T, dw))
        reference.t = step + 1
    model, optimizer = train(DCT(side), every=1)
    assert_same(model, reference.model)
    assert all(state["basis_code"].shape == (RANK,) for state in optimizer.state.values())
