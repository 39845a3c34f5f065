"""The `tail` setting: what it is refused with, what it is where a layer is narrow, and graphs under a budget."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.rules import PCA

from .small import EAGER, assert_exact, batch, net


@pytest.mark.parametrize("tail", [0, -1, 1.5, True, "half"])
def test_a_tail_that_is_no_number_of_columns_is_refused(tail) -> None:
    with pytest.raises(ValueError, match=f"tail is {tail!r}: it must be a whole number from 1, or a fraction"):
        oasis_backend(4, tail=tail)


@pytest.mark.parametrize("rule", ["gradient_oja", "gradient_svd", "random", "sampled", PCA(every=5)])
def test_a_rule_without_a_statistic_of_an_activation_is_refused(rule) -> None:
    with pytest.raises(ValueError, match="it goes with rules that move the basis of an activation by its statistic"):
        oasis_backend(4, subspace=rule, tail=4)


@pytest.mark.parametrize(("tail", "columns"), [(2, 5), (0.5, 9), (100, 12)])
def test_a_tail_is_columns_or_a_share_and_at_most_what_is_left(tail, columns) -> None:
    model = net()
    torch.compile(model, backend=oasis_backend(3, tail=tail, **EAGER))(batch()).square().sum().backward()
    assert model[0].weight.grad.factor.shape == (20, columns)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.0])
def test_gradients_are_projections_on_all_columns(inner, budget) -> None:
    model = net()
    reference = copy.deepcopy(model)
    backend = oasis_backend(3, tail=4, inner=inner, memory_budget=budget)
    compiled, optimizer = torch.compile(model, backend=backend), OasisAdamW(model.parameters(), lr=0.0)
    for step in range(3):
        compiled(batch(step)).square().sum().backward()
        reference(batch(step)).square().sum().backward()
        assert_exact(model, reference, {"0", "2"})
        q = model[0].weight.grad.subspace.basis.detach()
        torch.testing.assert_close(model[0].weight.grad.subspace.statistic, batch(step).T @ batch(step) @ q)
        optimizer.step(), optimizer.zero_grad(), reference.zero_grad()


def test_a_layer_without_room_for_a_tail_has_none() -> None:
    """One graph has weights with a tail and weights without."""
    model = net()
    reference = copy.deepcopy(model)
    backend = oasis_backend({"0.*": 12, "2.*": 4}, tail=2, **EAGER)
    torch.compile(model, backend=backend)(batch()).square().sum().backward()
    reference(batch()).square().sum().backward()
    assert [layer.weight.grad.factor.shape[1] for layer in (model[0], model[2])] == [12, 6]
    assert_exact(model, reference, {"0", "2"})


def test_what_is_kept_is_counted_in_the_report() -> None:
    """G has the columns of the tail, moments do not; T itself stands with the bases."""
    totals = []
    for tail in (4, None):
        torch._dynamo.reset()
        backend = oasis_backend(3, tail=tail, **EAGER)
        torch.compile(net(), backend=backend)(batch()).square().sum().backward()
        (report,) = backend.report()
        assert {row.rank for row in report.rows} == {3}
        totals.append(report.totals)
    one, other = totals
    assert one.gradient_bytes_after - other.gradient_bytes_after == 8 * 4 * (20 + 7)
    assert one.adam_bytes_after - other.adam_bytes_after == 8 * 4 * (12 + 20)
