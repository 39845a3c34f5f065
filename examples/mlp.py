"""A two-layer network, for `oasis-fx print mlp --rank 4` and `oasis-fx explain mlp`."""

from __future__ import annotations

import torch


def build() -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the model and one batch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))
    return model, torch.randn(128, 64)
