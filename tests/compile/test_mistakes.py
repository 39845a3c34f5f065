"""Mistakes that people make with the backend, and what they are told."""

from __future__ import annotations

import pytest
import torch

from oasis_fx import OasisAdamW, OasisMuon, oasis_backend
from oasis_fx.backend import default_backend


def compiled(**arguments):
    torch._dynamo.reset()
    return torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4)), **arguments)


def test_a_backend_that_was_not_made() -> None:
    with pytest.raises(ValueError, match=r"backend is oasis_backend itself.*oasis_backend\(rank=32\)"):
        compiled(backend=oasis_backend)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="got \\('pca',\\) after the rank"):
        oasis_backend(8, "pca")


def test_settings_among_the_options_of_inductor() -> None:
    with pytest.raises(Exception, match=r"options names 'rank'.*backend=oasis_backend\(rank=\.\.\.\)"):
        compiled(backend="oasis", options={"rank": 16})(torch.randn(2, 4))
    with pytest.raises(ValueError, match="options names 'rank', 'tail'"):
        oasis_backend(options={"rank": 16, "tail": 2})


def test_the_backend_by_its_name_has_a_report() -> None:
    assert default_backend() is default_backend() and isinstance(default_backend().report(), list)


def test_an_optimizer_shows_its_settings_alone() -> None:
    weights = list(torch.nn.Linear(4, 4).parameters())
    for kind in (OasisAdamW, OasisMuon):
        shown = repr(kind(weights))
        assert "lr: " in shown and "step_count" not in shown and "rank_plans" not in shown
