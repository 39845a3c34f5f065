"""A weight that is read over its rows here and over its columns there: right at every rank, or dense."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.graph.matricization import as_rows
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad as Gradient
from oasis_fx.runtime.optim.items import find_items
from oasis_fx.runtime.optim.sgd import OasisSGD
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

pytestmark = pytest.mark.filterwarnings("ignore::oasis_fx.LowRankGradWarning")


def broken(x, w):
    h = torch.tanh(F.linear(x, w))
    torch._dynamo.graph_break()
    return h @ w


def by_convolution(x, w):
    h = torch.tanh(F.conv2d(x[..., None, None], w[..., None, None])[..., 0, 0])
    torch._dynamo.graph_break()
    return h @ w


def backwards_first(x, w):
    h = torch.tanh(x[:, : w.shape[0]] @ w)
    torch._dynamo.graph_break()
    return F.linear(h, w)


def gradients(function, x, w):
    loss = function(x, w).square().sum()
    loss.backward()
    return w.grad


@pytest.mark.parametrize(
    ("rule", "rank", "shape"),
    [("oja", 2, (6, 6)), ("oja", 1.0, (4, 6)), ("gradient_oja", 1.0, (6, 6)), ("pca", 2, (4, 6))],
)
@pytest.mark.parametrize("function", [broken, by_convolution, backwards_first])
def test_two_graphs_read_a_weight_both_ways(function, shape, rank, rule) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    reference = torch.nn.Parameter(w.detach().clone())
    x = torch.randn(9, shape[1], dtype=torch.float64)
    rank = max(shape) if rank == 1.0 else rank  # both sides at full rank
    run = torch.compile(function, backend=oasis_backend(rank=rank, subspace=rule, inner="aot_eager"))
    expected = gradients(function, x, reference)
    optimizer = OasisSGD([w], lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        found = gradients(run, x, w)
        (item,) = find_items(optimizer)
        assert item.low_rank and len(STORE.all_of(w)) == 1
        basis = item.subspace.basis
        factor = (
            item.gradient.factor
            if isinstance(item.gradient, LowRankGrad)
            else as_rows(found_dense(found), item.features) @ basis
        )
        if rank == max(shape):
            torch.testing.assert_close(found_dense(found), expected)
        torch.testing.assert_close(factor, as_rows(expected, item.features) @ basis)
        optimizer.step()


def found_dense(gradient):
    return gradient.to_dense() if isinstance(gradient, LowRankGrad) else gradient


def test_factors_of_a_weight_and_of_its_transpose_are_never_added() -> None:
    """Where compiled code of other weights is used again, the second reading is rewritten as well."""
    w = torch.nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    one, other = (STORE.resolve([w], SubspaceSpec(6), [features]) for features in ((1, 2), (0, 1)))
    assert one is not other and STORE.resolve([w], SubspaceSpec(6), [(0, 1)]) is other
    a = Gradient(torch.randn(6, 6, dtype=torch.float64), one, w, features=(1, 2))
    b = Gradient(torch.randn(6, 6, dtype=torch.float64), other, w, features=(0, 1))
    c = Gradient(
        torch.randn(6, 6, dtype=torch.float64), one, w, features=(0, 1)
    )  # of one subspace, for what it is worth
    expected = a.to_dense() + b.to_dense() + c.to_dense()
    torch.testing.assert_close(found_dense(a + b) + c.to_dense(), expected)
    torch.testing.assert_close(found_dense(a.clone() + c) + b.to_dense(), expected)
    a.add_(b)
    a.add_(c)
    torch.testing.assert_close(a.to_dense(), expected)
    w.grad = a
    one.statistic, other.statistic = torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    optimizer = OasisAdamW([w], lr=0.1)
    optimizer.step()
    assert int(one.num_updates) == int(other.num_updates) == 1


def test_two_compiled_functions_read_a_weight_both_ways() -> None:
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    reference = torch.nn.Parameter(w.detach().clone())
    backend = oasis_backend(rank=6, inner="aot_eager")
    there, back = (torch.compile(f, backend=backend) for f in (lambda x, w: F.linear(x, w), lambda x, w: x @ w))
    ours, theirs = OasisSGD([w], lr=0.01), torch.optim.SGD([reference], lr=0.01, momentum=0.9)
    for step in range(4):
        x = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        back(torch.tanh(there(x, w)), w).square().mean().backward()
        (torch.tanh(x @ reference.t()) @ reference).square().mean().backward()
        for optimizer in (ours, theirs):
            optimizer.step(), optimizer.zero_grad()
    torch.testing.assert_close(w, reference)
    assert "another graph reads it over its other dimension" in str(backend.report()[-1])
