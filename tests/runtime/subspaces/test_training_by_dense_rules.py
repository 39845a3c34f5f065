"""Training under rules that leave gradients dense: their bases move, are saved, and are resumed."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.runtime.subspaces.basis_updates import update_bases
from oasis_fx.runtime.subspaces.rules import (
    DCT,
    GradientPower,
    rule_of,
)
from oasis_fx.runtime.subspaces.store import STORE

from .dense_rules import (
    KEPT,
    RANK,
    DenseGradientOja,
    DenseOja,
    DensePCA,
    DenseRandom,
)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 5, bias=False)
        self.double()

    def forward(self, x):
        return (self.down(torch.tanh(self.up(x))) - 1).square().mean()


def batch(step: int) -> torch.Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("rule", KEPT, ids=str)
def test_the_basis_behind_dense_gradients_moves_as_that_behind_low_rank_ones(rule, every) -> None:
    """The same weights, batches and seeds: both bases are equal after every step, as long as the weights are."""
    low_rank = type(rule).__mro__[1]
    sided = {"side": rule.side} if isinstance(rule, DCT) else {}
    bases, compiled = {}, {}
    for made in (rule, low_rank(**sided)):
        torch.manual_seed(1)
        model = Net()
        compiled[made.dense] = torch.compile(
            model, backend=oasis_backend(RANK, subspace=rule_of(made, every=every), inner="aot_eager")
        )
        optimizer = OasisAdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        found = bases[made.dense] = []
        for step in range(4):
            compiled[made.dense](batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            (subspace,) = STORE.all_of(model.up.weight)
            found.append((subspace.basis.detach().clone(), int(subspace.num_updates)))
        if made.dense:
            assert optimizer.state[model.up.weight]["exp_avg"].shape == (8, 6)
    uses_moments = isinstance(rule, GradientPower)  # which an optimizer with states at full size has none of
    for step, (one, other) in enumerate(zip(bases[True], bases[False], strict=True)):
        assert one[1] == other[1]
        if not uses_moments or step < every:
            torch.testing.assert_close(one[0], other[0])
    assert bases[True][-1][1] > 0


@pytest.mark.parametrize("rule", KEPT, ids=str)
def test_a_dense_rule_resumes_bitwise(rule) -> None:
    backend = oasis_backend(RANK, subspace=rule_of(rule, every=2), inner="aot_eager")

    def run(model, compiled, optimizer, steps) -> None:
        for step in steps:
            compiled(batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(1)
    model = Net()
    compiled, optimizer = torch.compile(model, backend=backend), OasisAdamW(model.parameters(), lr=1e-2)
    run(model, compiled, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, compiled, optimizer, range(3, 7))
    again = Net()
    compiled, optimizer = torch.compile(again, backend=backend), OasisAdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run(again, compiled, optimizer, range(3, 7))
    for found, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", ["random", "dct"])
def test_a_coded_basis_under_states_of_full_size_is_in_the_checkpoint(rule) -> None:
    backend = oasis_backend(RANK, subspace=rule, inner="aot_eager")
    torch.manual_seed(1)
    model = Net()
    optimizer = OasisAdamW(model.parameters(), lr=1e-2, full_size_states=True)
    torch.compile(model, backend=backend)(batch(0)).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    again = Net()
    other = OasisAdamW(again.parameters(), lr=1e-2, full_size_states=True)
    other.load_state_dict(saved)
    torch.manual_seed(2)
    torch.compile(again, backend=backend)(batch(1).mul(0)).backward()  # of zeros: it moves none
    (one,), (two,) = STORE.all_of(model.up.weight), STORE.all_of(again.up.weight)
    assert torch.equal(one.basis, two.basis) and int(one.num_updates) == int(two.num_updates)


@pytest.mark.parametrize("rule", [DenseOja(), DensePCA(), DenseRandom(), DenseGradientOja()], ids=str)
def test_another_optimizer_moves_them_by_update_bases(rule) -> None:
    model = Net()
    compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=rule_of(rule, every=1), inner="aot_eager"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(3):
        compiled(batch(step)).backward()
        optimizer.step()
        update_bases(model.parameters())
        optimizer.zero_grad()
    (subspace,) = STORE.all_of(model.up.weight)
    assert int(subspace.num_updates) == 3


def test_a_step_between_forward_and_backward_is_refused_or_right() -> None:
    """The graph keeps the basis that it projected on; one that has moved in place is not taken for it."""
    for rule in (DenseOja(), DenseRandom(), DensePCA()):
        torch._dynamo.reset()
        model = Net()
        compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=rule_of(rule, every=1), inner="aot_eager"))
        plain = Net()
        plain(batch(0)).backward()
        early = compiled(batch(0))
        (subspace,) = STORE.all_of(model.up.weight)
        q = subspace.basis.detach().clone()
        compiled(batch(1)).backward()
        update_bases(model.parameters())
        model.zero_grad()
        if rule.name == "dense_oja":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                early.backward()
            continue
        early.backward()
        torch.testing.assert_close(model.up.weight.grad, plain.up.weight.grad @ q @ q.T)
