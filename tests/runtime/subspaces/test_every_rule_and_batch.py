"""Every rule with every batch that training may bring: without rows, with few, constant, of zeros, not finite, huge."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.graph.matricization import as_rows
from oasis_fx.runtime.subspaces.rules import DCT, GradientPower
from oasis_fx.runtime.subspaces.store import STORE
from tests.rules import moving_every

N_IN, N_OUT, RANK = 6, 7, 3
BY_X = ["oja", "pca", "random", "principal_random", "sampled", "dct"]
BY_GRADIENT = ["gradient_svd", "gradient_oja", "gradient_power", DCT("gradient"), GradientPower(error_feedback=True)]
ALL = [*BY_X, *BY_GRADIENT]


class Twice(torch.nn.Module):
    """A weight that two modules share reads two activations, as a whole or in two parts."""

    def __init__(self, in_parts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.tied = torch.nn.Linear(N_IN, N_OUT), torch.nn.Linear(N_IN, N_OUT, bias=False)
        self.tied.weight = self.one.weight
        self.in_parts = in_parts
        self.double()

    def forward(self, x):
        if not self.in_parts:
            return self.one(x).sin().sum() + self.tied(x.cos()).sum()
        upper, lower = self.tied.weight.split([4, 3])
        used = (F.linear(x, upper), F.linear(x.cos(), upper), F.linear(x.sin(), lower), F.linear(x.cos(), lower))
        return sum(out.sin().sum() for out in used)


def batch(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, N_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BATCHES = {
    "of five": batch(5),
    "constant": torch.full((5, N_IN), 0.3, dtype=torch.float64),
    "zero": torch.zeros(5, N_IN, dtype=torch.float64),
    "huge": batch(5) * 1e30,
    "tiny": batch(5) * 1e-30,
    "fewer than r": batch(RANK - 1),
    "one": batch(1),
}


def projection_of(gradient: LowRankGrad) -> torch.Tensor:
    rule, q = gradient.subspace.spec.rule, gradient.basis.detach()
    weights = rule.weights(*q.shape) if hasattr(rule, "weights") else None
    return q if weights is None else q * weights.to(q)


def gradient_of(model, x: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model(x).backward()
    return next(model.parameters()).grad


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_the_gradient_of_every_batch_is_the_projection_of_the_dense_one(rule) -> None:
    """In the coordinates that are in force; and a basis stays orthonormal whatever it is chosen from."""
    model, plain = Twice(), Twice()
    compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=moving_every(rule, 1), inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    error, updates = None, 0
    for name, x in BATCHES.items():
        expected = gradient_of(plain, x)
        gradient = gradient_of(compiled, x)
        if rule == "sampled":
            assert not isinstance(gradient, LowRankGrad) and bool(gradient.isfinite().all()), name
        else:
            q = gradient.basis.detach()
            rows, subspace = as_rows(expected, gradient.features), gradient.subspace
            if error is not None and int(subspace.num_updates) > updates:
                rows = rows + error  # what the projection of the step before has lost
            error, updates = subspace.error, int(subspace.num_updates)
            torch.testing.assert_close(
                gradient.factor, rows @ projection_of(gradient), msg=lambda text, name=name: f"{name}: {text}"
            )
            if gradient.subspace.spec.rule.orthonormal:
                torch.testing.assert_close(q.T @ q, torch.eye(RANK).double(), msg=lambda t, name=name: f"{name}: {t}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_a_batch_without_rows_moves_nothing_and_others_of_its_step_do(rule) -> None:
    model, plain = Twice(in_parts=True), Twice(in_parts=True)
    compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=moving_every(rule, 1), inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    before = model.one.weight.detach().clone()
    gradient = gradient_of(compiled, batch(0))
    (subspace,) = STORE.all_of(model.one.weight)
    assert bool((gradient.factor if isinstance(gradient, LowRankGrad) else gradient).eq(0).all())
    optimizer.step()
    assert torch.equal(model.one.weight, before)
    assert int(subspace.num_updates) == (1 if rule == "random" else 0)  # that is drawn anew at the end of every step
    optimizer.zero_grad()
    for x in (batch(0), batch(8, 1), batch(8, 2)):
        compiled(x).backward()
        plain(x).backward()
    gradient = model.one.weight.grad
    if rule == "sampled":
        assert int(torch.linalg.matrix_rank(gradient)) > RANK  # each use in its own basis
    else:
        dense = as_rows(plain.one.weight.grad, gradient.features)
        torch.testing.assert_close(gradient.factor, dense @ projection_of(gradient))
    optimizer.step()
    optimizer.zero_grad()
    updates = {"sampled": 0, "random": 2, "oja": 1, "gradient_oja": 1}.get(str(rule), 0)
    assert int(subspace.num_updates) == updates  # a step stays in the basis that its first batch found
    gradient_of(compiled, batch(8, 3))
    optimizer.step()
    assert int(subspace.num_updates) == updates + (rule != "sampled")


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_full_rank_and_over_it(rule) -> None:
    """A rank over n is n, and the gradient is the dense one, in parts and under tied weights."""
    model = Twice(in_parts=True)
    expected = gradient_of(Twice(in_parts=True), batch(8))
    gradient = gradient_of(torch.compile(model, backend=oasis_backend(64, subspace=rule, inner="aot_eager")), batch(8))
    if isinstance(gradient, LowRankGrad):
        q = gradient.basis.detach()
        assert q.shape == (N_IN, N_IN)
        gradient = gradient.to_dense() if rule != "random" else gradient.factor @ torch.linalg.inv(q)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ALL, ids=str)
def test_weights_of_every_precision(rule, dtype) -> None:
    """The factor is what float64 says for the same numbers, but for the rounding of the precision."""
    model = Twice().to(dtype)
    x = batch(9).to(dtype)
    plain = Twice()
    plain.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    expected = gradient_of(plain, x.double())
    compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=moving_every(rule, 1), inner="aot_eager"))
    gradient = gradient_of(compiled, x)
    assert gradient.dtype == dtype
    optimizer = OasisAdamW(model.parameters(), lr=1e-3)
    if rule != "sampled":
        dense = as_rows(expected, gradient.features) @ projection_of(gradient).double()
        tolerance = 20 * torch.finfo(dtype).eps
        assert float((gradient.factor.double() - dense).norm() / dense.norm()) < tolerance
        assert gradient.basis.dtype == torch.float32
    for _ in range(2):
        optimizer.step()
        gradient = gradient_of(compiled, x)
        assert bool(model.one.weight.isfinite().all())
