"""Captured energy of rules that choose their basis from the batch: of the batch that moved it, in the new basis."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.graph.matricization import as_rows

X = torch.randn(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.logspace(
    0, -1, 12, dtype=torch.float64
)


@pytest.mark.parametrize("rule", ["pca", "dct", "principal_random", "gradient_svd", "gradient_power"])
def test_follows_its_definition(rule) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 20, bias=False, dtype=torch.float64)
    plain = copy.deepcopy(model)
    backend = oasis_backend(4, subspace=rule, inner="aot_eager")
    torch.compile(model, backend=backend)(X).sin().sum().backward()
    plain(X).sin().sum().backward()
    gradient = model.weight.grad
    of_gradient = rule.startswith("gradient")
    chosen_by = as_rows(plain.weight.grad, gradient.features) if of_gradient else X
    q = gradient.basis.detach().clone()
    expected = float((chosen_by @ q).square().sum() / chosen_by.square().sum())
    (found,) = backend.stats()
    assert 0.1 < expected <= 1 and math.isclose(found.captured_energy, expected, rel_tol=1e-9)
    OasisAdamW(model.parameters()).step()
    (after,) = backend.stats()
    assert after.captured_energy == found.captured_energy and after.num_updates == 1
