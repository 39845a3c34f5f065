"""A weight without elements trains as it does in stock torch: dense, with its reason."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx import AutoRank, oasis_backend

from .small import EAGER, assert_exact, backward, batch


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("rank", [3, 0.5, AutoRank(0.5)])
def test_no_features_in_or_out(rank) -> None:
    layers = (12, 5), (5, 0), (0, 4), (4, 3)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(*sizes) for sizes in layers)).double()
    reference = copy.deepcopy(model)
    backward(reference, batch())
    backend = oasis_backend(rank=rank, exclude=(), **EAGER)
    backward(torch.compile(model, backend=backend), batch())
    assert_exact(model, reference, {"0", "3"})
    (record,) = backend.compiled_graphs()
    assert {record.names[at]: why for at, why in record.reasons.items()} == {
        "1.weight": "it has no elements: its shape is [0, 5]",
        "2.weight": "it has no elements: its shape is [4, 0]",
    }
    assert "it has no elements" in str(backend.report()[0])
