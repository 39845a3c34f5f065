"""A step that is left out, since a gradient is not finite, at every point of a rule's period."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.graph.matricization import as_rows
from oasis_fx.runtime.subspaces.basis_updates import move_due_bases
from oasis_fx.runtime.subspaces.initial import initial_basis, new_subspace
from oasis_fx.runtime.subspaces.rules import DCT, DrawnRule, GradientPower, Random, rule_of
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE
from tests.rules import moving_every

RANK, EVERY = 3, 2


@dataclass(frozen=True)
class Rotating(DrawnRule):
    """Drawn, orthonormal, and states follow: what neither of the drawn rules that come with the package is."""

    name: ClassVar[str] = "rotating"

    def first_code(self, r, seed):
        return torch.zeros(1, dtype=torch.int64, device="cpu")

    def next_code(self, code):
        return code + 1

    def expand(self, code, n, r, dtype, device):
        return initial_basis(n, r, dtype, device, seed=int(code))


ALL = ["oja", "pca", "random", "principal_random", "sampled", "gradient_svd", "gradient_oja", "gradient_power", "dct",
       DCT("gradient"), GradientPower(error_feedback=True), Rotating()]  # fmt: skip


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 5, bias=False)
        self.double()

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def batch(step: int) -> torch.Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


class Run:
    def __init__(self, backend) -> None:
        self.model = Net()
        self.compiled = torch.compile(self.model, backend=backend)
        self.optimizer = OasisAdamW(self.model.parameters(), lr=1e-2)

    def step(self, step: int, spoilt: bool = False) -> None:
        loss = (self.compiled(batch(step)) - 1).square().mean()
        (loss * torch.nan if spoilt else loss).backward()
        if spoilt:
            with pytest.warns(RuntimeWarning, match="not finite"):
                self.optimizer.step()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def saved(self):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy(state), torch.get_rng_state()

    def load(self, saved) -> None:
        state, random = saved
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        torch.set_rng_state(random)

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_a_run_goes_on_from_a_step_that_was_left_out_and_so_does_its_checkpoint(rule) -> None:
    """At each step of a period in turn; what is resumed there is bitwise the uninterrupted run, again and again."""
    backend = oasis_backend(RANK, subspace=moving_every(rule, EVERY), inner="aot_eager")
    for spoilt_at in (0, 1, 2, 3):
        torch.manual_seed(1)
        run = Run(backend)
        for step in range(spoilt_at):
            run.step(step)
        before, subspaces = run.weights(), run.optimizer.subspaces()
        counts = {key: int(state["step"]) for key, state in run.optimizer.state.items()}
        codes = {s: s.code.clone() for s in subspaces if isinstance(s.spec.rule, DrawnRule)}
        means = {w: (run.optimizer.state[w]["exp_avg"].clone(), s.basis.detach().clone())
                 for s, members in subspaces.items() for w in members}  # fmt: skip
        run.step(spoilt_at, spoilt=True)
        assert all(map(torch.equal, run.weights(), before))
        assert all(int(state["step"]) == counts.get(key, 0) for key, state in run.optimizer.state.items())
        assert all(torch.equal(s.code, code) for s, code in codes.items())
        for weight, (mean, basis) in means.items():
            (subspace,) = STORE.all_of(weight)
            overlap = basis.T @ subspace.basis.detach()
            follows = subspace.spec.rule.transports and not torch.equal(basis, subspace.basis.detach())
            found = run.optimizer.state[weight]["exp_avg"]
            torch.testing.assert_close(found, mean @ overlap if follows else mean, rtol=1e-10, atol=1e-12)
        for again_spoilt in (False, True):  # the second checkpoint is made right after the first was loaded
            saved = run.saved()
            resumed = Run(backend)
            resumed.load(saved)
            if again_spoilt:
                for one in (run, resumed):
                    torch.set_rng_state(saved[1])
                    one.step(spoilt_at + 1, spoilt=True)
                saved = resumed.saved()
                resumed = Run(backend)
                resumed.load(saved)
            for one in (run, resumed):
                torch.set_rng_state(saved[1])
                for step in range(spoilt_at + 2, spoilt_at + 2 + EVERY):
                    one.step(step)
            assert all(map(torch.equal, run.weights(), resumed.weights())), (spoilt_at, again_spoilt)
        assert all(bool(p.isfinite().all()) for p in run.weights())


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_the_gradient_after_a_step_that_was_left_out_is_in_the_present_basis(rule) -> None:
    torch.manual_seed(1)
    run = Run(oasis_backend(RANK, subspace=moving_every(rule, EVERY), inner="aot_eager"))
    for step, spoilt in enumerate((False, True, True)):
        run.step(step, spoilt)
    plain = Net()
    plain.load_state_dict(run.model.state_dict())
    for model in (run.compiled, plain):
        (model(batch(9)) - 1).square().mean().backward()
    for found, expected in zip(run.model.parameters(), plain.parameters(), strict=True):
        gradient = found.grad
        if isinstance(gradient, LowRankGrad):
            q, r = gradient.basis.detach(), gradient.subspace.spec.rule
            weights = r.weights(*q.shape) if hasattr(r, "weights") else None
            rows = as_rows(expected.grad, gradient.features)
            if gradient.subspace.error is not None:
                continue  # what the projection lost before is in it: test_rules.py
            torch.testing.assert_close(gradient.factor, rows @ (q if weights is None else q * weights.double()))


def test_the_momentum_that_a_rule_is_lent_follows_a_basis_that_moved_in_a_step_left_out() -> None:
    """LDAdam's B = rho m Q^T + ...: m and Q are of one basis, after a step that was left out too."""
    run = Run(oasis_backend(RANK, subspace="gradient_power", inner="aot_eager"))
    run.step(0)
    run.step(1)
    weight = run.model.up.weight
    (subspace,) = STORE.all_of(weight)
    old, mean = subspace.basis.detach().clone(), subspace.momentum.mean.clone()
    # One weight's gradient is not finite, those of the others have moved their bases.
    (run.compiled(batch(2)) - 1).square().mean().backward()
    run.model.up.bias.grad.fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match="not finite"):
        run.optimizer.step()
    assert not torch.equal(subspace.basis, old)
    torch.testing.assert_close(subspace.momentum.mean, mean @ (old.T @ subspace.basis.detach()))
    assert subspace.momentum.mean is run.optimizer.state[weight]["exp_avg"]


@pytest.mark.parametrize("rule", [Rotating(), Random()], ids=str)
def test_a_drawn_basis_is_drawn_anew_in_its_turn_whether_the_step_counts_or_not(rule) -> None:
    """As a GPU has it, where whether a step counts is a tensor that the host does not read."""
    for counts in (True, False):
        spec = SubspaceSpec(RANK, rule_of(rule, every=2))
        subspace = new_subspace(torch.zeros(6, RANK, dtype=torch.float64), spec)
        first = subspace.basis
        assert move_due_bases([subspace], torch.tensor(True)) == {}
        overlaps = move_due_bases([subspace], torch.tensor(counts))  # its turn
        torch.testing.assert_close(overlaps[subspace], first.T @ subspace.basis)
        assert not torch.equal(subspace.basis, first)
        assert move_due_bases([subspace], torch.tensor(True)) == {}


def test_states_follow_a_drawn_basis_whose_rule_wants_it() -> None:
    run = Run(oasis_backend(RANK, subspace=rule_of(Rotating(), every=1), inner="aot_eager"))
    run.step(0)
    weight = run.model.up.weight
    (subspace,) = STORE.all_of(weight)
    q = initial_basis(6, RANK, torch.float64, torch.device("cpu"), seed=0)
    plain = Net()
    (plain(batch(0)) - 1).square().mean().backward()
    mean = 0.1 * plain.up.weight.grad @ q  # 1 - b1 of the first factor
    torch.testing.assert_close(run.optimizer.state[weight]["exp_avg"], mean @ (q.T @ subspace.basis))
