"""What a user sees of a rule: captured energy, which convolutions it takes, refusals that name it."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.graph.matricization import as_rows
from oasis_fx.runtime.subspaces.rules import DCT, GradientPower, rule_of
from oasis_fx.runtime.subspaces.store import STORE

EAGER = {"inner": "aot_eager"}


def batch(step: int) -> torch.Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


@pytest.mark.parametrize(
    "rule",
    ["pca", "dct", "principal_random", "gradient_svd", "gradient_power", DCT("gradient"), GradientPower(rho=0.0)],
    ids=str,
)
def test_captured_energy_of_rules_that_choose_from_the_batch(rule) -> None:
    """That of the batch in the basis chosen from it; nothing is known of later ones, and of none before the first."""
    torch.manual_seed(0)
    model, plain = (torch.nn.Linear(6, 8, bias=False, dtype=torch.float64) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    backend = oasis_backend(3, subspace=rule_of(rule, every=2), **EAGER)
    compiled, optimizer = torch.compile(model, backend=backend), OasisAdamW(model.parameters(), lr=0.0)
    for step in range(4):
        x = batch(step)
        compiled(x).sin().sum().backward()
        plain(x).sin().sum().backward()
        q = model.weight.grad.basis.detach()
        a = x if rule in ("pca", "dct", "principal_random") else as_rows(plain.weight.grad, model.weight.grad.features)
        if step % 2 == 0:
            expected = float((a @ q).square().sum() / a.square().sum())
            assert 0 < expected < 1
        optimizer.step()
        (found,) = backend.stats()
        assert found.captured_energy == pytest.approx(expected, rel=1e-9)
        for module in (model, plain):
            module.zero_grad()


def test_captured_energy_of_numbers_whose_squares_overflow() -> None:
    model = torch.nn.Linear(6, 8, bias=False)
    backend = oasis_backend(3, subspace="pca", **EAGER)
    torch.compile(model, backend=backend)(batch(0).float() * 1e25).sum().backward()
    q, x = model.weight.grad.basis.detach().double(), batch(0)
    (found,) = backend.stats()
    assert found.captured_energy == pytest.approx(float((x @ q).square().sum() / x.square().sum()), rel=1e-5)


@pytest.mark.parametrize("rule", ["oja", "random", "gradient_svd"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_every_dimension(dims, rule) -> None:
    torch.manual_seed(0)
    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims]
    model = kind(4, 5, 2, stride=2, bias=False, dtype=torch.float64)
    plain = copy.deepcopy(model)
    x = torch.randn(2, 4, *[4] * dims, dtype=torch.float64)
    torch.compile(model, backend=oasis_backend(3, subspace=rule, **EAGER))(x).sin().sum().backward()
    plain(x).sin().sum().backward()
    gradient = model.weight.grad
    assert isinstance(gradient, LowRankGrad)
    dense = as_rows(plain.weight.grad, gradient.features)
    torch.testing.assert_close(gradient.factor, dense @ gradient.basis.detach())


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(6, 8, dtype=torch.float64)

    def forward(self, x):
        return self.up(x).sin().sum()


@pytest.mark.parametrize("full_rank", [False, True])
@pytest.mark.parametrize("rule", ["random", "dct", "principal_random"])
def test_a_rank_that_cannot_change_names_the_rule_of_a_checkpoint_too(rule, full_rank) -> None:
    """Before any graph has asked for the bases, and so without a rule at hand."""
    model = Net()
    optimizer = OasisAdamW(model.parameters(), lr=1e-2, full_size_states=full_rank)
    torch.compile(model, backend=oasis_backend(3, subspace=rule, **EAGER))(batch(0)).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    message = f"rank is 4: bases of subspace='{rule}' cannot change their rank"
    for refuse in (lambda: optimizer.resize_rank(4), lambda: optimizer.resize_checkpoint(saved, 4)):
        with pytest.raises(ValueError, match=message):
            refuse()
    fresh = Net()
    other = OasisAdamW(fresh.parameters(), lr=1e-2, full_size_states=full_rank)
    other.load_state_dict(saved)
    with pytest.raises(ValueError, match=message):
        other.resize_rank(4)
    # It was refused before anything had changed: the same backend takes the checkpoint.
    torch.compile(fresh, backend=oasis_backend(3, subspace=rule, **EAGER))(batch(1)).backward()
    other.step()
    (subspace,) = STORE.all_of(fresh.up.weight)
    assert subspace.shape == (6, 3)
