"""Weights of several dtypes in one optimizer step as each would alone, though they have the same settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD, oasis_backend

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: OasisAdamW(params, lr=1e-2, stochastic_rounding=False),
    "adamw, eight bits": lambda params: OasisAdamW(params, lr=1e-2, stochastic_rounding=False, state_bits=8),
    "sgd": lambda params: OasisSGD(params, lr=1e-2, stochastic_rounding=False, nesterov=True),
    "lion": lambda params: OasisLion(params, lr=1e-2, stochastic_rounding=False),
    "muon": lambda params: OasisMuon(params, lr=1e-2, stochastic_rounding=False),
}


def nets() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [torch.nn.Linear(64, 96).to(dtype) for dtype in DTYPES]


def train(models: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer], compiled: bool) -> None:
    torch._dynamo.reset()
    backend = oasis_backend(rank=64, inner="aot_eager") if compiled else "eager"
    runs = [torch.compile(model, backend=backend) for model in models]
    x = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for batch in x:
        for run, dtype in zip(runs, DTYPES, strict=True):
            run(batch.to(dtype)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:.*is in a subspace")
@pytest.mark.parametrize("compiled", [False, True], ids=["dense", "low-rank"])
@pytest.mark.parametrize("name", MAKERS)
def test_each_steps_as_it_would_alone(name: str, compiled: bool) -> None:
    make = MAKERS[name]
    together, apart = nets(), nets()
    train(together, [make([p for model in together for p in model.parameters()])], compiled)
    train(apart, [make(model.parameters()) for model in apart], compiled)
    for one, other in zip(together, apart, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), p.dtype
