"""Which basis each weight has where weights of one activation are told apart."""

from __future__ import annotations

import copy

import torch

from oasis_fx import oasis_backend

from .small import EAGER, assert_exact, backward, batch


class Two(torch.nn.Module):
    """Both layers read one activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (torch.nn.Linear(12, 7, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.a(x) * self.b(x).sin()


def test_weights_of_one_activation_have_the_ranks_that_they_were_given() -> None:
    model = Two()
    reference = copy.deepcopy(model)
    backward(reference, batch())
    backward(torch.compile(model, backend=oasis_backend({"a.*": 3, "b.*": 5}, **EAGER)), batch())
    assert_exact(model, reference, {"a", "b"})
    assert model.a.weight.grad.factor.shape == (7, 3) and model.b.weight.grad.factor.shape == (7, 5)
    bases = [layer.weight.grad.subspace for layer in (model.a, model.b)]
    for subspace in bases:  # each with the statistic of its own
        q = subspace.basis.detach()
        torch.testing.assert_close(subspace.statistic, batch().T @ (batch() @ q))
