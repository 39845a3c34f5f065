"""Weights of other sizes through one graph, as functions get them: torch makes the sizes symbols on request."""

from __future__ import annotations

import warnings

import pytest
import torch

from oasis_fx import LowRankGrad, OasisWarning, oasis_backend
from oasis_fx.graph.matricization import as_rows

SIZES = range(4, 16, 2)


def loss(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(x @ first.t()) @ second).square().sum()


def weights(n: int) -> tuple[torch.Tensor, torch.nn.Parameter, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(n)
    shapes = (5, n), (n + 3, n), (n + 3, 4)
    x, *both = (torch.randn(shape, dtype=torch.float64, generator=draw) for shape in shapes)
    return x, *map(torch.nn.Parameter, both)


def assert_right(weight: torch.Tensor, dense: torch.Tensor, rank: float) -> None:
    gradient = weight.grad
    if not isinstance(gradient, LowRankGrad):  # what a rule leaves dense
        assert gradient.norm() > 0
        return
    basis, n = gradient.basis.detach(), gradient.basis.shape[0]
    assert basis.shape[1] == min(n, rank if isinstance(rank, int) else max(1, round(rank * n)))
    torch.testing.assert_close(gradient.factor, as_rows(dense, gradient.features) @ basis)


@pytest.mark.parametrize(
    ("rank", "num_graphs"), [(2, 2), (0.5, len(SIZES)), (9, len(SIZES))], ids=["within", "a share", "across"]
)
@pytest.mark.parametrize("subspace", ["oja", "pca", "sampled", "gradient_svd"])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_serves_weights_of_all_sizes(rank, num_graphs, subspace, inner) -> None:
    """As many graphs as the rank needs: of stock's two, one serves all sizes that have the same rank."""
    backend = oasis_backend(rank=rank, subspace=subspace, inner=inner)
    compiled = torch.compile(loss, backend=backend)
    with torch._dynamo.config.patch(force_parameter_static_shapes=False), warnings.catch_warnings():
        warnings.simplefilter("error", OasisWarning)
        warnings.filterwarnings("ignore", "rank is .* over the width of")  # "across" means that
        for n in SIZES:
            x, first, second = weights(n)
            found = compiled(x, first, second)
            found.backward()
            dense = torch.autograd.grad(loss(x, first, second), [first, second])
            torch.testing.assert_close(found, loss(x, first, second))
            if subspace != "sampled":  # its factor is of a basis that no step shows
                for weight, gradient in zip((first, second), dense, strict=True):
                    assert_right(weight, gradient, rank)
    assert len(backend.compiled_graphs()) <= num_graphs
    assert all(not record.reasons for record in backend.compiled_graphs())
