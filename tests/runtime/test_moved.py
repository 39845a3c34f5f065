"""A model that is moved or cast in the midst of training: its subspaces lose nothing."""

from __future__ import annotations

import pytest
import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.runtime.subspaces.rules import GradientPower, rule_of
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Momentum, Subspace, SubspaceSpec

# What belongs to the object, or stands for what is compared besides.
OWN = {"handle", "dtype", "device", "_stored", "_num_recoded", "energy", "latest_move"}


def full_subspace(weight: torch.nn.Parameter, rule: str) -> Subspace:
    """One in which no attribute has its first value."""
    spec = SubspaceSpec(3, rule_of(rule, lr="auto" if rule.endswith("oja") else None))
    subspace = STORE.resolve([weight], spec, [(1, 2)])
    made = iter(torch.randn(40, generator=torch.Generator().manual_seed(1)))
    for name, value in vars(subspace).items():
        if name in OWN | {"spec", "shape", "family", "code"}:
            continue
        if name == "names":
            subspace.names = ("a.weight",)
        elif name == "replicas":
            subspace.replicas = frozenset({0, 1})
        elif name == "momentum":
            subspace.momentum = Momentum(torch.randn(5, 3), torch.tensor(4.0), 0.9)
        elif isinstance(value, bool):
            setattr(subspace, name, not value)
        elif isinstance(value, int):
            setattr(subspace, name, value + 7)
        elif name in ("num_updates", "num_steps"):
            value.add_(3)
        else:
            assert value is None or value.is_floating_point(), f"{name} is new: see that _moved takes it along"
            shape = {"statistic": (6, 3), "overlap": (3, 3), "error": (5, 6), "last_move": (4, 4)}.get(name, ())
            setattr(subspace, name, torch.full(shape, float(next(made))))
    return subspace


@pytest.mark.parametrize("rule", ["oja", "random"])
def test_every_attribute_of_a_subspace_is_taken_along(rule) -> None:
    weight = torch.nn.Parameter(torch.randn(5, 6))
    subspace = full_subspace(weight, rule)
    basis = subspace.basis.detach().clone()
    weight.data = weight.data.double()
    moved = STORE.resolve([weight], subspace.spec, [(1, 2)])
    assert moved is not subspace and moved.dtype == torch.float64
    torch.testing.assert_close(moved.basis.detach(), basis.double(), rtol=1e-6, atol=1e-7)
    assert set(vars(moved)) == set(vars(subspace))
    for name in set(vars(subspace)) - OWN:
        was, found = getattr(subspace, name), getattr(moved, name)
        if name == "momentum":
            assert (found.beta, float(found.step)) == (was.beta, float(was.step))
            assert found.mean.dtype == torch.float64
            torch.testing.assert_close(found.mean, was.mean.double())
        elif isinstance(was, torch.Tensor):
            assert torch.equal(found.double(), was.double()), name
            assert not was.is_floating_point() or found.dtype == torch.float64, name
        else:
            assert found is was or found == was, name


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 5, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def batch(step: int) -> torch.Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize(
    "rule", ["oja", "random", "gradient_power", GradientPower(error_feedback=True), "gradient_oja", "dct"], ids=str
)
def test_a_model_cast_in_the_midst_trains_on_as_one_that_was_not(rule) -> None:
    """From float32 to float64: the steps after it are those of a run in float32, but for its rounding."""
    ends = []
    for cast_after in (None, 3):
        torch._dynamo.reset()
        torch.manual_seed(3)
        model = Net()
        finding = rule_of(rule, lr="auto") if rule in ("oja", "gradient_oja") else rule
        compiled = torch.compile(model, backend=oasis_backend(3, subspace=finding, inner="aot_eager"))
        optimizer = OasisAdamW(model.parameters(), lr=1e-2)
        for step in range(6):
            if step == cast_after:
                model.double()
            (compiled(batch(step).to(model.up.weight.dtype)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().double() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
