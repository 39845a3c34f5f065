"""Error feedback over several backward passes of a step: what a projection lost is taken up once."""

from __future__ import annotations

import copy

import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.runtime.subspaces.rules import GradientPower


def batch(seed: int) -> torch.Tensor:
    return torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_second_micro_batch_does_not_take_the_error_up_again() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 12, bias=False, dtype=torch.float64)
    backend = oasis_backend(3, subspace=GradientPower(error_feedback=True), inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    compiled(batch(0)).sin().sum().backward()
    subspace = model.weight.grad.subspace
    error = subspace.error.clone()
    optimizer.step()
    optimizer.zero_grad()
    old, mean = subspace.basis.detach().clone(), optimizer.state[model.weight]["exp_avg"].clone()
    plain = copy.deepcopy(model)
    for seed in (1, 2):
        compiled(batch(seed)).sin().sum().backward()
        plain(batch(seed)).sin().sum().backward()
    q, whole = subspace.basis.detach(), plain.weight.grad + error
    assert float((error @ q).norm()) > 0.1
    torch.testing.assert_close(model.weight.grad.factor, whole @ q)
    # What both projections lost, and what the moment did when the basis moved, with b1 = 0.9.
    lost = whole - whole @ q @ q.T + 0.9 / 0.1 * (mean @ old.T - mean @ old.T @ q @ q.T)
    torch.testing.assert_close(subspace.error, lost)
