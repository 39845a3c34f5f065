"""Stored weights as matrices: against explicit loops over indices."""

from __future__ import annotations

import pytest
import torch

from oasis_fx.graph.matricization import add_product_, as_rows, from_rows, num_features, num_rows

LAYOUTS = {
    "linear [m, n]": ((5, 8), (1, 2)),
    "Conv1D [n, m]": ((8, 5), (0, 1)),
    "convolution [m, c, h, w]": ((5, 2, 2, 2), (1, 4)),
    "heads [h, d, n]": ((2, 3, 8), (2, 3)),
    "heads [n, h, d]": ((8, 2, 3), (0, 1)),
    "experts [e, m, n]": ((3, 5, 8), (2, 3)),
    "experts [e, n, m]": ((3, 8, 5), (1, 2)),
}


def expected_rows(weight: torch.Tensor, features: tuple[int, int]) -> torch.Tensor:
    """Row by row: fix all dimensions but the features, slowest first."""
    shape = [1 if features[0] <= dim < features[1] else size for dim, size in enumerate(weight.shape)]
    rows = []
    for index in torch.cartesian_prod(*(torch.arange(size) for size in shape)).view(-1, len(shape)).tolist():
        at = tuple(slice(None) if features[0] <= dim < features[1] else i for dim, i in enumerate(index))
        rows.append(weight[at].reshape(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows(name) -> None:
    shape, features = LAYOUTS[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = expected_rows(weight, features)
    assert rows.shape == (num_rows(shape, features), num_features(shape, features))
    assert torch.equal(as_rows(weight, features), rows)
    assert torch.equal(from_rows(rows, shape, features), weight)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_products_are_added_in_place(name, channels_last) -> None:
    shape, features = LAYOUTS[name]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    if channels_last:
        weight = weight.transpose(0, -1).contiguous().transpose(0, -1)  # strides in which rows are no view
    u, basis = (
        torch.randn(size, 3, generator=generator, dtype=torch.float64)
        for size in (num_rows(shape, features), num_features(shape, features))
    )
    expected = 0.5 * expected_rows(weight, features) - 2.0 * u @ basis.T
    strides = weight.stride()
    add_product_(weight, u, basis, features, beta=0.5, alpha=-2.0)
    torch.testing.assert_close(expected_rows(weight, features), expected)
    assert weight.stride() == strides
